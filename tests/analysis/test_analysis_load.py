"""Saved runs are read whole, labelled by what differs, and never half-read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.load import load
from analysis.news import left_out_line
from analysis.saved import SourceError
from analysis.series import series_of

MakeRun = Callable[..., Path]
ONE = {"p": "one two three four five six"}


def labels(folder: Path) -> list[str]:
    return [one.label for one in series_of(load([str(folder)]))]


def test_a_study_folder_nested_at_any_depth_gives_every_run_once(
    study: Path, tmp_path: Path
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "sweep").symlink_to(study)
    runs = load([str(tmp_path), str(study), str(study / "run_0p5")])
    assert list(runs.runs["strength"]) == [-0.5, -0.1, 0.0, 0.1, 0.5, 2.0]
    assert len(runs.summaries) == 6 * 3


def test_only_finished_and_whole_runs_are_data(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    make_run(tmp_path / "going", prompts=ONE, state="running")
    make_run(tmp_path / "broken", prompts=ONE, state="failed")
    for name in ("status.json", "summary.json", "trajectory.parquet", "iterations.parquet"):
        run = make_run(tmp_path / f"torn-{name}", prompts=ONE)
        (run / name).write_bytes((run / name).read_bytes()[:-9])
        run = make_run(tmp_path / f"without-{name}", prompts=ONE)
        (run / name).unlink()
    runs = load([str(tmp_path)])
    assert list(runs.runs["run_id"]) == ["good"]
    line = left_out_line(runs.left_out)
    assert "\n" not in line
    assert line.startswith("Left out 10 runs")
    assert "going (running)" in line
    assert "broken (failed)" in line
    assert "torn-summary.json (unreadable summary.json)" in line
    assert "without-trajectory.parquet (no trajectory.parquet)" in line


def test_folders_of_hydra_and_of_the_tracker_are_not_runs(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    for folder in (".hydra", "wandb/offline-run-1/files"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").write_text("a: 1", encoding="utf-8")
    assert load([str(tmp_path)]).left_out == ()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent", "no such folder"),
        ("empty", "no run folder"),
        ("unfinished", "no finished run"),
        ("notes.txt", "this is a file"),
        ("offline-run-1", "its W&B log breaks off before the run begins"),
        ("offline-run-1/run-1.wandb", "its W&B log breaks off before the run begins"),
        ("wandb:someone", "give wandb:ENTITY/PROJECT"),
    ],
)
def test_a_source_that_is_no_good_is_one_sentence(
    make_run: MakeRun, tmp_path: Path, source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.txt").write_text("hello", encoding="utf-8")
    Path("offline-run-1").mkdir()
    Path("offline-run-1/run-1.wandb").write_bytes(b":W&B")
    make_run(Path("unfinished/a"), prompts=ONE, state="running")
    with pytest.raises(SourceError, match=words) as caught:
        load([source])
    assert "\n" not in str(caught.value)
    assert source in str(caught.value)


def test_a_partitioned_trajectory_reads_like_a_single_file(
    make_run: MakeRun, tmp_path: Path
) -> None:
    text = {"007": "one two three four five six"}
    make_run(tmp_path / "file" / "a", prompts=text, steps=2, feedback__strength=0.5)
    make_run(
        tmp_path / "parts" / "a", prompts=text, steps=2, feedback__strength=0.5, partitioned=True
    )
    one, other = (load([str(tmp_path / name)]).grid(0, "007") for name in ("file", "parts"))
    assert one.tokens == other.tokens == ("one", " two", " three", " four", " five", " six")
    assert one.step == other.step == 2
    np.testing.assert_array_equal(one.log_prob, other.log_prob)


def test_lacking_and_null_measures_are_missing(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "old", prompts=ONE, drop_measures=("oracle_error_max", "kl_step"))
    new = make_run(tmp_path / "new", prompts=ONE, feedback__strength=0.5)
    null = pd.read_parquet(new / "iterations.parquet").assign(kl_step=None)
    null.to_parquet(new / "iterations.parquet")
    runs = load([str(tmp_path)])
    old = runs.runs.index[runs.runs["run_id"] == "old"][0]
    lacking = runs.iterations["run"] == old
    assert runs.iterations.loc[lacking, "oracle_error_max"].isna().all()
    assert runs.iterations.loc[~lacking, "oracle_error_max"].notna().all()
    assert runs.iterations["kl_step"].isna().all()


def test_not_reached_is_missing_and_never_a_number(study: Path) -> None:
    runs = load([str(study)])
    rows = runs.summaries.set_index(["run", "prompt_id"])["iterations_to_tolerance"]
    assert np.isnan(rows.loc[5, "harbour"])
    assert rows.loc[5, "rain"] > 0


def test_a_label_names_exactly_the_settings_that_differ(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "a", prompts=ONE, feedback__strength=0.5, recompute__damping=0.7)
    make_run(tmp_path / "b", prompts=ONE, feedback__strength=0.5, recompute__damping=1)
    make_run(tmp_path / "c", prompts=ONE, feedback__strength=-2, recompute__damping=1.0)
    assert labels(tmp_path) == ["β = 0.5, damping 0.7", "β = −2, damping 1", "β = 0.5, damping 1"]


def test_runs_without_feedback_have_no_strength(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "a", prompts=ONE, feedback__kind="none", feedback__strength=1.0)
    make_run(tmp_path / "b", prompts=ONE, feedback__strength=0.5)
    assert labels(tmp_path) == ["β = 0.5, log_prob", "no feedback"]


def test_no_two_runs_share_a_label(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        make_run(tmp_path / name, prompts=ONE, feedback__strength=0.5)
    found = labels(tmp_path)
    assert len(set(found)) == 3
    assert found[0] == "β = 0.5"
    assert "(b)" in found[1]


def test_the_same_run_id_in_two_studies_is_two_runs(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_run(tmp_path / name / "a", study=name, prompts=ONE, feedback__strength=0.5)
    assert labels(tmp_path) == ["β = 0.5, study first", "β = 0.5, study second"]


def test_unknown_ids_are_named_with_those_that_exist(study: Path) -> None:
    runs = load([str(study)])
    with pytest.raises(SourceError, match="no run nope; there are: run_m0p5"):
        runs.only(run_ids=["nope"], prompt_ids=[])
    with pytest.raises(SourceError, match="no prompt nope; there are: harbour, rain, list"):
        runs.only(run_ids=[], prompt_ids=["nope"])


def test_json_that_is_not_a_mapping_is_unreadable(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    run = make_run(tmp_path / "odd", prompts=ONE)
    (run / "summary.json").write_text(json.dumps([1, 2]), encoding="utf-8")
    assert [item.reason for item in load([str(tmp_path)]).left_out] == ["unreadable summary.json"]
