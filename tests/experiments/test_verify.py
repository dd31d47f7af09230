"""A saved run, computed again: the same trajectory, or what is different about it."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

import experiments.converge.run
from experiments import verify
from experiments.converge.settings import ConvergeSettings

Compute = Callable[..., Path]
Called = tuple[int, str, str]
Ask = Callable[..., Called]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """``python -m experiments.verify`` with these words."""

    def call(*words: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["verify", *map(str, words)])
        capsys.readouterr()
        try:
            code = verify.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def change(folder: Path, by: float) -> None:
    """Move one estimate of a stored trajectory."""
    table = pq.read_table(folder / "trajectory.parquet")
    values = table["log_prob"].to_numpy().copy()
    values[5] += by
    at = table.schema.get_field_index("log_prob")
    column = pc.cast(pa.array(values, from_pandas=True), table.schema.field("log_prob").type)
    table = table.set_column(at, table.schema.field("log_prob"), column)
    pq.write_table(table, folder / "trajectory.parquet")


def edit(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_run_computed_again_is_reproduced_bit_for_bit(compute: Compute, ask: Ask) -> None:
    folder = compute("generation.max_new_tokens=2", "generation.strategy=sample", "seed=3")
    code, out, err = ask(folder)
    rows = pq.read_metadata(folder / "trajectory.parquet").num_rows
    said = f"{folder.name} is reproduced bit for bit: {rows} estimates of 2 prompts.\n"
    assert (code, out, err) == (0, said, "")


def test_a_copy_in_a_wandb_folder_is_the_run_that_it_copies(
    compute: Compute, ask: Ask, tmp_path: Path
) -> None:
    folder = compute()
    for name in ("offline-run-1/files/run_folder", "renamed"):
        copy = shutil.copytree(folder, tmp_path / name)
        code, out, err = ask(copy, "--run", folder.name)
        assert (code, err) == (0, "")
        assert out.startswith(f"{folder.name} is reproduced bit for bit")


def test_a_difference_is_measured_and_one_beyond_the_bound_is_not_reproduced(
    compute: Compute, ask: Ask, tmp_path: Path
) -> None:
    little, much = compute("feedback.strength=0.1"), compute("feedback.strength=0.2")
    change(little, 2e-5)
    change(much, 2e-2)
    code, out, _ = ask(tmp_path / "runs", "--all")
    assert code == 1
    said = {line.split()[0]: line for line in out.splitlines()}
    assert set(said) == {little.name, much.name}
    assert "is reproduced within 0.001 nats, the bound for float32" in said[little.name]
    assert "1 of them differ, by at most 2e-05 nats (prompt prose, step 0" in said[little.name]
    assert "is NOT reproduced: " in said[much.name]
    assert "by at most 0.02 nats" in said[much.name]
    assert "more than 0.001 nats" in said[much.name]
    assert ask(tmp_path / "runs", "--run", little.name)[0] == 0
    code, out, err = ask(tmp_path / "runs", "--seed", "1")
    assert out.count("\n") == 1
    assert err.startswith("Of 2 runs, ")


def test_what_diverged_is_reproduced_whatever_bits_a_processor_gives_what_is_no_number() -> None:
    frames = [
        pd.DataFrame(
            {key: ["a", "a"] if key == "prompt_id" else [0, 1] for key in verify.KEYS}
            | {"token_id": [5, 6], "log_prob": np.array([-1.0, value], dtype=np.float32)}
        )
        for value in (np.nan, -np.nan, -2.0)
    ]
    reproduced, said = verify.compare(*frames[:2], "float32")
    assert reproduced
    assert "1 of them differ, by at most 0 nats" in said
    assert verify.compare(frames[0], frames[0], "float32")[1].startswith(" bit for bit")
    assert not verify.compare(frames[0], frames[2], "float32")[0]


def test_what_a_run_needs_and_is_gone_or_changed_is_one_sentence(
    compute: Compute, ask: Ask, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"id": "a", "text": "it was"}\n', encoding="utf-8")
    folder = compute(f"prompts.file={texts}")
    texts.write_text('{"id": "a", "text": "it is"}\n', encoding="utf-8")
    code, out, _ = ask(folder)
    assert code == 1
    assert f"{folder.name} is NOT reproduced: its settings now give run " in out
    texts.unlink()
    code, out, _ = ask(folder)
    assert code == 1
    assert out.startswith(f"{folder.name} cannot be computed again: prompts.file")
    assert out.count("\n") == 1


def test_a_run_of_more_passes_than_today_is_told_from_it(compute: Compute, ask: Ask) -> None:
    folder = compute("feedback.strength=0", "recompute.damping=0.5")
    path = folder / "trajectory.parquet"
    once = pq.read_table(path)  # as plain passes were repeated before they counted as settled
    at = once.schema.get_field_index("iteration")
    again = once.set_column(at, once.schema.field(at), pc.add(once["iteration"], 1).cast("int32"))
    pq.write_table(pa.concat_tables([once, again]), path)
    code, out, _ = ask(folder)
    assert code == 1
    said = "others (48 estimates to iteration 2, now 24 estimates to iteration 1)"
    assert out == f"{folder.name} is NOT reproduced: its tokens, passes or precision are {said}.\n"


def test_other_commits_changes_and_versions_are_warned_of(
    compute: Compute, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compute()
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    edit(
        folder / "status.json",
        lambda old: old.update(commit="0" * 40, dirty=True, changes={"sha256": "f" * 64}),
    )
    edit(folder / "status.json", lambda old: old["versions"].update(torch="1.0"))

    def copy(settings: ConvergeSettings) -> Path:
        """The very run stands in for the second computation: its records alone differ."""
        again = shutil.copytree(folder, Path(settings.runs_dir) / "s" / folder.name)
        edit(
            again / "status.json",
            lambda new: new.update(commit="1" * 40, dirty=False, changes=None, device="another"),
        )
        edit(again / "status.json", lambda new: new["versions"].update(torch="2.0"))
        return again

    monkeypatch.setattr(experiments.converge.run, "converge", copy)
    code, _, err = ask(folder)
    assert code == 0
    assert err == (
        f"warning: {folder.name} was computed with commit 000000000000, now 111111111111;"
        " uncommitted changes ffffffffffff, now none; torch 1.0, now 2.0;"
        f" device {status['device']}, now another\n"
    )
    # new files that are no source change nothing
    edit(folder / "status.json", lambda old: old.update(changes={"sha256": "e3b0c4", "bytes": 0}))
    assert "uncommitted changes" not in ask(folder)[2]


def test_a_stored_configuration_is_data(
    compute: Compute, ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    folder = compute()
    edit(folder / "config.yaml", lambda c: c["prompts"].update(file="${oc.env:SECRET}.txt"))
    code, out, err = ask(folder)
    assert code == 1
    assert "hidden" not in out + err
    assert "${oc.env:SECRET}" in out
    edit(folder / "config.yaml", lambda c: c.update({"hydra/launcher": "x"}))
    assert "hydra/launcher" in ask(folder)[1]


def test_what_holds_no_run_is_one_sentence(ask: Ask, tmp_path: Path) -> None:
    code, out, err = ask(tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("error: STUDY must hold a finished run")
    assert err.count("\n") == 1
