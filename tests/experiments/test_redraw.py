"""Real runs, read back: from W&B's folder the same tables and pictures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.__main__ import main

Compute = Callable[..., Path]


@pytest.fixture
def studied(compute: Compute, tmp_path: Path) -> tuple[Path, Path]:
    """A study of real runs, and the offline W&B folders of its runs, copied to another place."""
    for words in (["feedback.strength=-1"], ["feedback.strength=0.5"]):
        compute("tracking.mode=offline", *words, "generation.max_new_tokens=1")
    study, copied = tmp_path / "runs" / "s", tmp_path / "copied"
    for folder in study.glob("*/wandb/offline-run-*"):
        shutil.copytree(folder, copied / folder.name)
    moved = shutil.move(study, tmp_path / "moved")  # nothing may be read from where it was
    return Path(moved), copied


def test_tables_and_figures_are_the_same_from_run_folders_and_from_copied_wandb_folders(
    studied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in studied:
        assert main(["table", str(source), "--csv", str(tmp_path / f"{source.name}.csv")]) == 0
        assert main(["figures", str(source), "--out", str(tmp_path / "drawn" / source.name)]) == 0
    one, other = (tmp_path / f"{source.name}.csv" for source in studied)
    assert one.read_bytes() == other.read_bytes()
    folders = [tmp_path / "drawn" / source.name for source in studied]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert {"headline.png", "settling.png", "tokens.png", "generation.png"} <= set(names[0])
    for name in names[0]:
        contents = [folder / name for folder in folders]
        if name.endswith(".svg"):
            texts = [
                path.read_text(encoding="utf-8").replace(str(source), "SOURCE")
                for path, source in zip(contents, studied, strict=True)
            ]
            assert texts[0] == texts[1]
            continue
        pictures, said = [], []
        for path, source in zip(contents, studied, strict=True):
            with Image.open(path) as picture:
                pictures.append(np.array(picture))
                said.append({k: v.replace(str(source), "SOURCE") for k, v in picture.text.items()})
        assert np.array_equal(pictures[0], pictures[1])
        assert said[0] == said[1]
        assert said[0]["Comment"].startswith("redraw: python -m analysis figures SOURCE")


def test_a_table_says_beside_it_which_runs_it_holds_and_how_to_make_it_again(
    compute: Compute, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compute()
    path = tmp_path / "t.csv"
    words = ["table", str(folder), "--run", folder.name, "--csv", str(path)]
    assert main(words) == 0
    about = json.loads((tmp_path / "t.csv.json").read_text(encoding="utf-8"))
    assert about["runs"] == [folder.name]
    command = f"python -m analysis table {folder} --run {folder.name}"
    assert about["redraw"] == f"{command} --csv {path}"
    assert capsys.readouterr().out.splitlines()[-1] == f"runs: {folder.name}; again: {command}"
