"""Trained models as a table and a figure: grouped by all but the seed, read as they were saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from analysis.__main__ import main as analysis
from analysis.figures.depth import curve_of
from analysis.load import load
from analysis.series import series_of
from analysis.trainings import grouped, load_trainings, main, spread

Save = Callable[..., Path]
MakeRun = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(
        name: str, *, seed: int = 0, nll: list[float], passes: int = 1, steps: int = 10, **kept: Any
    ) -> Path:
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        stateful = passes > 1
        settings = {
            "seed": seed,
            "corpus": {"train": f"/somewhere/{name}"},
            "architecture": {"n_layer": 4, "n_embd": 8, "hidden_feedback": stateful},
            "training": {
                "steps": steps,
                "passes": passes,
                "draw_passes": False,
                "through_passes": kept.get("through", False),
                "update_every_pass": False,
            },
        }
        (folder / "training.yaml").write_text(yaml.safe_dump(settings))
        kl = [0.5 / 4**n for n in range(len(nll) - 1)]
        depths = {
            "trained_passes": passes,
            "nll": nll,
            "kl": kl,
            "nll_full": nll[-1] + 0.01 if stateful else None,
            "contracts": True,
            "broken_at": None,
            "tokens": 100,
            "characters_per_token": 2.0,
        }
        (folder / "depths.json").write_text(json.dumps(depths))
        (folder / "history.json").write_text(json.dumps([{"tokens_read": 1000 * passes * steps}]))
        save_file({"a": np.zeros((3, 4)), "b": np.zeros(5)}, folder / "model.safetensors")
        return folder

    return write


@pytest.fixture
def models(save: Save, tmp_path: Path) -> Path:
    for seed in range(3):
        save(f"plain-{seed}", seed=seed, nll=[3.0 + 0.1 * seed])
        save(f"d3-{seed}", seed=seed, nll=[3.5, 2.9, 2.8 + 0.01 * seed, 2.85], passes=3)
    save("longer-0", nll=[2.95], steps=30)
    (tmp_path / "models" / "unfinished").mkdir()
    return tmp_path / "models"


def test_seeds_are_put_together_and_nothing_else(models: Path) -> None:
    groups = grouped(load_trainings([str(models)]))
    assert [group.label for group in groups] == [
        "4 layers, plain, 10 steps",
        "4 layers, plain, 30 steps",
        "4 layers, stateful, D = 3, detached, 10 steps",
    ]
    assert [len(group.trainings) for group in groups] == [3, 1, 3]
    stateful = groups[-1]
    assert stateful.trainings[0].trained_depth == 2
    assert stateful.values(2) == pytest.approx([2.8, 2.81, 2.82])
    assert stateful.values(None) == pytest.approx([2.86] * 3)
    assert groups[0].values(None) == pytest.approx([3.0, 3.1, 3.2]), "a plain model has one depth"
    assert groups[0].values(1) == []
    assert stateful.trainings[0].parameters == 17


def test_the_table_states_mean_spread_and_cost(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(models), "--csv", str(tmp_path / "all.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    plain, _, stateful = lines[2:]
    assert "3.1000 ± 0.1000" in plain
    assert "| 0.01 " in plain
    assert "2.8100 ± 0.0100" in stateful
    assert "1.4300" in stateful, "nats/character at the depth of generation: 2.86 over 2"
    assert "3 of 3" in stateful
    assert "| 0.03 " in stateful, "three passes cost three times as much"
    rows = pd.read_csv(tmp_path / "all.csv")
    assert len(rows) == 7
    assert rows["nll_2"].dropna().tolist() == pytest.approx([2.8, 2.81, 2.82])


def test_the_figure_is_drawn_and_tells_how_to_redraw_it(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    assert main([str(models), "--out", str(out)]) == 0
    with Image.open(out / "depth.png") as image:
        assert "analysis.trainings" in image.info["Comment"]
        assert "d3-0" in image.info["Description"]
        first = np.asarray(image)
    assert main([str(models), "--out", str(out)]) == 0
    with Image.open(out / "depth.png") as image:
        assert (np.asarray(image) == first).all()


def test_a_folder_without_trainings_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "depths.json" in err


@pytest.mark.parametrize("name", ["depths.json", "history.json", "training.yaml"])
def test_a_damaged_training_is_one_sentence(
    save: Save, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save("one", nll=[3.0])
    (folder / name).write_text("{")
    assert main([str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(folder) in err


def test_one_value_has_no_spread() -> None:
    assert spread([1.0]) == "1.0000"
    assert spread([1.0, 2.0]) == "1.5000 ± 0.7071"
    assert spread([]) == "–"


def test_runs_that_feed_hidden_states_back_are_drawn_by_depth(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [
        make_run(
            tmp_path / f"s{strength}", feedback__kind="hidden_state", feedback__strength=strength
        )
        for strength in (0.5, 1.0)
    ]
    runs.append(make_run(tmp_path / "plain", feedback__kind="none"))
    summary = json.loads((runs[0] / "summary.json").read_text())
    (runs[0] / "summary.json").write_text(json.dumps({**summary, "trained_passes": 3}))
    assert analysis(["figures", *map(str, runs), "--out", str(tmp_path / "figures")]) == 0
    with Image.open(tmp_path / "figures" / "depth.png") as image:
        ids = image.info["Description"]
    assert "s0.5" in ids
    assert "plain" not in ids

    loaded = load([str(run) for run in runs])
    by_label = {one.label: one for one in series_of(loaded)}
    curve = curve_of(loaded, by_label["s = 0.5, hidden_state"])
    rows = loaded.iterations[loaded.iterations["run"] == by_label["s = 0.5, hidden_state"].run]
    assert curve.trained == 2, "three passes end at depth 2"
    for depth in (0, 1, 4):
        at = rows[rows["iteration"] == depth + 1]
        assert curve.nll[0, depth] == pytest.approx(at["nll"].mean())
        if depth:
            assert curve.kl[0, depth - 1] == pytest.approx(at["kl_step"].mean())
