"""Real runs, read back: from W&B's folder the same tables and pictures, and computed again the
same trajectory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from analysis.verify import overrides, verify
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from analysis.__main__ import main
from analysis.load import load

Converge = Callable[..., tuple[int, str, str]]
Compute = Callable[..., Path]
Runs = Callable[[], list[Path]]


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
    assert "convergence.png" in names[0]
    assert any(name.startswith("heat_map_") for name in names[0])
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
    assert about["redraw"] == f"{command} --csv table.csv"
    assert capsys.readouterr().out.splitlines()[-1] == f"runs: {folder.name}; again: {command}"


# --- verify -------------------------------------------------------------------------------------


def change(folder: Path, by: float) -> None:
    """Move one estimate of a stored trajectory."""
    table = pq.read_table(folder / "trajectory.parquet")
    values = table["log_prob"].to_numpy().copy()
    values[5] += by
    at = table.schema.get_field_index("log_prob")
    column = pc.cast(pa.array(values), table.schema.field("log_prob").type)
    table = table.set_column(at, table.schema.field("log_prob"), column)
    pq.write_table(table, folder / "trajectory.parquet")


def test_a_run_computed_again_is_reproduced_bit_for_bit(
    compute: Compute, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compute("generation.max_new_tokens=2", "generation.strategy=sample", "seed=3")
    assert main(["verify", str(folder)]) == 0
    rows = pq.read_metadata(folder / "trajectory.parquet").num_rows
    said = capsys.readouterr()
    assert said.out == (
        f"{folder.name} is reproduced bit for bit: {rows} estimates of 2 prompts.\n"
    ), said.err


@pytest.mark.slow
def test_a_difference_is_measured_and_one_beyond_the_bound_is_not_reproduced(
    compute: Compute, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    little = compute("feedback.strength=0.1")
    much = compute("feedback.strength=0.2")
    change(little, 2e-5)
    change(much, 2e-2)
    assert main(["verify", str(tmp_path / "runs"), "--all"]) == 1
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(said) == {little.name, much.name}
    assert "reproduced within 0.001 nats, the bound for float32" in said[little.name]
    assert "1 of them differ, by at most 2e-05 nats (prompt prose, step 0" in said[little.name]
    assert "NOT reproduced: more than 0.001 nats" in said[much.name]
    assert "by at most 0.02 nats" in said[much.name]


@pytest.mark.slow
def test_what_a_run_needs_and_is_gone_or_changed_is_one_sentence(
    compute: Compute, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"id": "a", "text": "it was"}\n', encoding="utf-8")
    folder = compute("prompts.source=file", f"prompts.file={texts}")
    texts.write_text('{"id": "a", "text": "it is"}\n', encoding="utf-8")
    assert main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"{folder.name} is NOT reproduced: its settings now give run " in out
    texts.unlink()
    assert main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{folder.name} cannot be computed again: prompts.file")
    assert out.count("\n") == 1


def test_other_commits_changes_and_versions_are_warned_of(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compute()
    path = folder / "status.json"
    status = json.loads(path.read_text(encoding="utf-8"))
    status |= {"commit": "0" * 40, "dirty": True, "changes": {"sha256": "f" * 64}}
    status["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(status), encoding="utf-8")
    (run,) = load([str(folder)]).saved.values()
    # the very run stands in for the second computation: what differs is in its records alone
    monkeypatch.setattr("analysis.verify._compute", lambda _, runs_dir: _copy(folder, runs_dir))
    verdict = verify(run)
    assert verdict.reproduced
    assert verdict.warnings == ()
    again = json.loads(path.read_text(encoding="utf-8"))
    again |= {"commit": "1" * 40, "dirty": False, "changes": None, "device": "cpu: another"}
    again["versions"]["torch"] = "2.0"
    path.write_text(json.dumps(again), encoding="utf-8")
    warned = verify(run).warnings
    assert [warning.removeprefix(f"{run.run_id} was computed ") for warning in warned] == [
        "at commit 000000000000, now the commit is 111111111111",
        "with uncommitted changes ffffffffffff, now there are no uncommitted changes",
        "with torch 1.0, now 2.0",
        f"on {status['device']}, now on cpu: another",
    ]


def _copy(folder: Path, runs_dir: Path) -> None:
    shutil.copytree(folder, runs_dir / "s" / folder.name)


def test_a_stored_configuration_becomes_the_same_settings_on_the_command_line(
    converge: Converge, runs: Runs, tmp_path: Path
) -> None:
    odd = tmp_path / "it's [a] = {b}, $c 100%.txt"
    odd.write_text("it was a fine morning", encoding="utf-8")
    words = ["feedback.layers=[0,1]", "feedback.strength=-1e-3", "generation.top_k=3"]
    assert converge("prompts=file", f'prompts.file="{odd}"', *words)[0] == 0
    (folder,) = runs()
    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert stored["prompts"]["file"] == str(odd)
    again = [f"runs_dir={tmp_path / 'again'}", "tracking.mode=disabled"]
    code, _, err = converge(*overrides(stored), *again)
    assert (code, err) == (0, "")
    (second,) = (tmp_path / "again" / "s").iterdir()
    assert second.name == folder.name
    other = yaml.safe_load((second / "config.yaml").read_text(encoding="utf-8"))
    assert {**other, "runs_dir": None} == {**stored, "runs_dir": None}


@given(st.text(alphabet=st.sampled_from("ab ='\"\\\\,[]{}()$:#~+/.é\t")))
def test_any_text_reaches_the_runner_as_it_is(text: str) -> None:
    (word,) = overrides({"prompts": {"file": text}})
    (parsed,) = OverridesParser.create().parse_overrides([word])
    assert parsed.value() == text


@pytest.mark.parametrize("key", ["--config-dir", "-m", "hydra/launcher", "+a", "~a", "a=b", "a b"])
def test_a_configuration_cannot_smuggle_options_into_the_command(
    compute: Compute, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    folder = compute()
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, key: "x"}), encoding="utf-8")
    assert main(["verify", str(folder)]) == 2
    assert "a key that is no setting" in capsys.readouterr().err
