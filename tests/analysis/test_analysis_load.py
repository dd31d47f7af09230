"""Saved runs are read whole, labelled by what differs, and never half-read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from analysis import load
from analysis.__main__ import main
from analysis.labels import with_labels
from analysis.read.saved import SourceError
from analysis.read.sources import left_out_line

MakeRun = Callable[..., Path]
PARQUET = ("trajectory.parquet", "iterations.parquet")
ONE = {"p": "one two three four five six"}


def labels(folder: Path) -> list[str]:
    return list(load(str(folder)).runs["label"])


def test_a_study_folder_nested_at_any_depth_gives_every_run_once(
    study: Path, tmp_path: Path
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "sweep").symlink_to(study)
    runs = load(tmp_path, str(study), study / "run_0p5")
    assert list(runs.runs["strength"]) == [-0.5, -0.1, 0.0, 0.1, 0.5, 2.0]
    assert len(runs.prompts) == 6 * 3


def test_no_theorem_bounds_what_feeds_itself_or_is_damped(
    make_run: MakeRun, tmp_path: Path
) -> None:
    own = {"feedback__shift": 0, "feedback__hidden_strength": 1.0}
    make_run(tmp_path / "a", prompts=ONE, **own)
    make_run(tmp_path / "b", prompts=ONE, feedback__kind="hidden_state", feedback__shift=0)
    make_run(tmp_path / "c", prompts=ONE, recompute__damping=0.5)
    make_run(tmp_path / "d", prompts=ONE, feedback__hidden_strength=1.0)
    runs = load(str(tmp_path)).runs.set_index("run_id")
    assert dict(runs["ends_by_theorem"]) == {"a": False, "b": False, "c": False, "d": True}


def test_only_finished_and_whole_runs_are_data(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    make_run(tmp_path / "going", prompts=ONE, state="running")
    make_run(tmp_path / "broken", prompts=ONE, state="failed")
    for name in ("status.json", "summary.json", "trajectory.parquet", "iterations.parquet"):
        run = make_run(tmp_path / f"torn-{name}", prompts=ONE)
        (run / name).write_bytes((run / name).read_bytes()[:-9])
        run = make_run(tmp_path / f"without-{name}", prompts=ONE)
        (run / name).unlink()
    runs = load(str(tmp_path))
    assert list(runs.runs["run_id"]) == ["good"]
    line = left_out_line(runs.left_out)
    assert "\n" not in line
    assert line.startswith("Left out 10 runs")
    assert "going (running)" in line
    assert "broken (failed)" in line
    assert "torn-summary.json (unreadable summary.json)" in line
    assert "without-trajectory.parquet (no trajectory.parquet)" in line


def test_a_pipe_or_device_in_place_of_a_file_is_never_waited_for(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    for name in ("status.json", "config.yaml", "summary.json", *PARQUET):
        for kind, make in (("pipe", os.mkfifo), ("zero", lambda p: p.symlink_to("/dev/zero"))):
            run = make_run(tmp_path / f"{kind}-{name}", prompts=ONE)
            (run / name).unlink()
            make(run / name)
    left_out = {item.run_id: item.reason for item in load(str(tmp_path)).left_out}
    assert len(left_out) == 10
    for run_id, reason in left_out.items():
        assert reason == f"unreadable {run_id.partition('-')[2]}"


def test_folders_of_hydra_and_of_the_tracker_are_not_runs(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    for folder in (".hydra", "wandb/offline-run-1/files"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").write_text("a: 1", encoding="utf-8")
    assert load(str(tmp_path)).left_out == ()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent", "no such folder"),
        ("", "'': there is no such folder"),  # of a shell's variable that is not set
        ("a" * 300, "no such folder"),
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
        load(source)
    assert "\n" not in str(caught.value)
    assert source in str(caught.value)


def test_a_link_that_leads_nowhere_hides_no_other_folder(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "s" / "good", prompts=ONE)
    for name, target in (("loop", "loop"), ("gone", "nowhere"), ("back", "..")):
        (tmp_path / "s" / name).symlink_to(target)
    runs = load(str(tmp_path / "s"))
    assert list(runs.runs["run_id"]) == ["good"]
    assert runs.left_out == ()


def test_a_folder_that_may_not_be_read_is_left_out_by_name(make_run: MakeRun) -> None:
    with TemporaryDirectory() as name:  # pytest's own is root's alone
        study, before = Path(name), os.geteuid()
        study.chmod(0o755)
        make_run(study / "good", prompts=ONE)
        assert load(name).left_out == ()
        closed = make_run(study / "closed", prompts=ONE)
        closed.chmod(0)
        if before == 0:  # to root all is open
            os.seteuid(65534)
        try:
            runs = load(name)
        finally:
            os.seteuid(before)
            closed.chmod(0o700)
    assert list(runs.runs["run_id"]) == ["good"]
    [left_out] = runs.left_out
    assert (left_out.run_id, left_out.reason) == ("closed", "Permission denied")


def test_lacking_and_null_measures_are_missing(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "old", prompts=ONE, drop_measures=("oracle_error_max", "kl_step"))
    new = make_run(tmp_path / "new", prompts=ONE, feedback__strength=0.5)
    null = pd.read_parquet(new / "iterations.parquet").assign(kl_step=None)
    null.to_parquet(new / "iterations.parquet")
    runs = load(str(tmp_path))
    old = runs.runs.index[runs.runs["run_id"] == "old"][0]
    lacking = runs.iterations["run"] == old
    assert runs.iterations.loc[lacking, "oracle_error_max"].isna().all()
    assert runs.iterations.loc[~lacking, "oracle_error_max"].notna().all()
    assert runs.iterations["kl_step"].isna().all()


def test_not_reached_is_missing_and_never_a_number(study: Path) -> None:
    runs = load(str(study))
    rows = runs.prompts.set_index(["run", "prompt_id"])["iterations_to_tolerance"]
    assert np.isnan(rows.loc[5, "harbour"])
    assert rows.loc[5, "rain"] > 0


def test_a_label_names_exactly_the_settings_that_differ(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "a", prompts=ONE, feedback__strength=0.5, recompute__damping=0.7)
    make_run(tmp_path / "b", prompts=ONE, feedback__strength=0.5, recompute__damping=1)
    make_run(tmp_path / "c", prompts=ONE, feedback__strength=-2, recompute__damping=1.0)
    assert labels(tmp_path) == ["β = 0.5, damping 0.7", "β = −2, damping 1", "β = 0.5, damping 1"]
    runs = load(str(tmp_path)).runs
    assert list(runs["variant"]) == ["damping 0.7", "damping 1", "damping 1"]


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
    runs = load(str(study))
    with pytest.raises(SourceError, match="no run nope; there are: run_m0p5"):
        runs.only(run_ids=["nope"], prompt_ids=[])
    with pytest.raises(SourceError, match="no prompt nope; there are: harbour, rain, list"):
        runs.only(run_ids=[], prompt_ids=["nope"])


def test_only_the_chosen_prompts_are_in_a_trajectory_though_one_has_none(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(tmp_path / "a", prompts={"p": "one two three", "q": "four five six"})
    other = make_run(tmp_path / "b", prompts={"r": "seven eight"}, feedback__strength=0.5)
    path = other / "trajectory.parquet"
    content = path.read_bytes()
    status = {"state": "finished", "checksums": {}}  # found to be damaged where it is first read
    (other / "status.json").write_text(json.dumps(status), encoding="utf-8")
    path.write_bytes(content[:20] + bytes(200) + content[220:])
    chosen = load(str(tmp_path)).only(prompt_ids=["p", "r"])
    assert set(chosen.trajectory["prompt_id"]) == {"p"}
    assert len(chosen.damaged) == 1


def test_json_that_is_not_a_mapping_is_unreadable(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    run = make_run(tmp_path / "odd", prompts=ONE)
    (run / "summary.json").write_text(json.dumps([1, 2]), encoding="utf-8")
    assert [item.reason for item in load(str(tmp_path)).left_out] == ["unreadable summary.json"]


def test_the_first_position_is_missing_so_that_a_plain_mean_is_the_loss(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = load(str(make_run(tmp_path / "a", feedback__strength=0.5)))
    rows = runs.trajectory
    assert rows.loc[rows["position"] == 0, "log_prob"].isna().all()
    last = rows[rows["iteration"] == rows["iteration"].max()]
    mean = -last.groupby("prompt_id", observed=True)["log_prob"].mean()
    expected = runs.prompts.set_index("prompt_id")["nll"]
    assert mean.to_dict() == pytest.approx(expected.to_dict())


def test_estimates_hold_the_first_and_the_last_pass_of_every_token(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for start, strength in (("cold", 0.5), ("carried", 0.5), ("carried", 0.0)):
        changes = {"recompute__start": start, "feedback__strength": strength}
        make_run(tmp_path / f"{start}_{strength}", prompts=ONE, steps=2, **changes)
    runs = load(str(tmp_path))
    estimates = runs.estimates.set_index("run")
    for run, (start, strength) in runs.runs[["start", "strength"]].iterrows():
        rows = estimates.loc[run]
        assert len(rows) == 4 + 5 + 6, "the text of each step"
        plain = (rows["step"] == 0) | (start == "cold") | (strength == 0)
        known = (rows["position"] > 0) & plain
        assert (rows["change"].notna() == known).all(), "a carried pass is not the plain model's"
        of_run = runs.trajectory[runs.trajectory["run"] == run]
        last = of_run[of_run["iteration"] == of_run["iteration"].max()]
        np.testing.assert_array_equal(rows["last"].to_numpy(), last["log_prob"].to_numpy())


def test_damage_deep_in_a_trajectory_leaves_out_that_run_alone(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "in" / "good", prompts=ONE, feedback__strength=0.5)
    bad = make_run(tmp_path / "in" / "bad", prompts=ONE, feedback__strength=1.0)
    path = bad / "trajectory.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes(200) + content[220:])
    assert main(["figures", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "Left out 1 run that is not finished and whole: bad (unreadable" in lines[0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trajectory.parquet", {"log_prob": "x"}),
        ("trajectory.parquet", {"position": 0.5}),
        ("iterations.parquet", {"nll": "x"}),
        ("iterations.parquet", {"iteration": None}),
    ],
)
def test_columns_of_other_types_leave_out_the_run(
    make_run: MakeRun, tmp_path: Path, name: str, change: dict[str, object]
) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    run = make_run(tmp_path / "odd", prompts=ONE)
    pd.read_parquet(run / name).assign(**change).to_parquet(run / name)
    left_out = load(str(tmp_path)).left_out
    assert [(item.run_id, item.reason) for item in left_out] == [
        ("odd", f"{name} has columns of other types")
    ]


def test_what_a_disk_does_not_give_back_leaves_out_the_run(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    run = make_run(tmp_path / "bad", prompts=ONE)
    status = {"state": "finished", "checksums": {"summary.json": "0" * 64}}
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
    (run / "summary.json").unlink()
    (run / "summary.json").symlink_to("/proc/self/mem")  # a file whose beginning is an I/O error
    left_out = load(str(tmp_path)).left_out
    assert [(item.run_id, item.reason) for item in left_out] == [("bad", "unreadable summary.json")]


@pytest.mark.parametrize("name", PARQUET)
def test_text_that_is_no_utf8_leaves_out_the_run(
    make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    path = make_run(tmp_path / "odd", prompts=ONE) / name
    table = pq.read_table(path)
    place = table.column_names.index("token" if "token" in table.column_names else "prompt_id")
    odd = pa.array([b"\xff"] * len(table), pa.binary()).view(pa.string())
    table = table.set_column(place, table.column_names[place], odd)
    pq.write_table(table.replace_schema_metadata({"pandas": b"\xff"}), path)
    runs = load(str(tmp_path))
    left_out = (*runs.damaged, *runs.left_out)
    assert [(item.run_id, item.reason) for item in left_out] == [("odd", f"unreadable {name}")]


@pytest.mark.parametrize("name", PARQUET)
def test_rows_that_no_file_of_its_size_holds_are_not_read(
    make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    path = make_run(tmp_path / "vast", prompts=ONE) / name
    one = pq.read_table(path).slice(0, 1)
    part = pa.concat_tables([one] * 100_000).combine_chunks()
    with pq.ParquetWriter(path, part.schema, compression="zstd") as writer:
        for _ in range(20):
            writer.write_table(part)
    [left_out] = load(str(tmp_path)).left_out
    assert left_out.reason == f"{name} claims 2,000,000 rows in {path.stat().st_size:,} bytes"


def test_numbers_sort_as_numbers_also_within_text(make_run: MakeRun, tmp_path: Path) -> None:
    for limit in (9, 10, 100):
        make_run(tmp_path / f"n{limit}", prompts=ONE, recompute__iterations=limit)
        make_run(tmp_path / f"m{limit}", prompts=ONE, model__name=f"m{limit}")
    models = load(*(str(tmp_path / f"m{limit}") for limit in (100, 9, 10)))
    assert list(models.runs["model"]) == ["m9", "m10", "m100"]
    limits = load(*(str(tmp_path / f"n{limit}") for limit in (100, 9, 10)))
    assert list(limits.runs["iterations_allowed"]) == [9, 10, 100]
    assert list(limits.runs["label"]) == [f"β = 0, {n} iterations" for n in (9, 10, 100)]


def test_runs_of_other_reporting_tolerances_have_other_labels(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for tolerance in (1e-3, 1e-4):
        make_run(tmp_path / f"t{tolerance}", prompts=ONE, reporting_tolerance=tolerance)
    assert labels(tmp_path) == [f"β = 0, reporting_tolerance {t}" for t in ("0.0001", "0.001")]


def test_prompt_files_are_named_without_folder_where_that_tells_them_apart() -> None:
    files = ["a/prose.jsonl", "a/code.jsonl"]
    frame = pd.DataFrame({"study": "s", "kind": "log_prob", "run_id": ["x", "y"]})
    frame["prompts.file"] = files
    assert set(with_labels(frame, ["prompts.file"])["variant"]) == {"prompts prose", "prompts code"}
    frame["prompts.file"] = ["a/prose.jsonl", "b/prose.jsonl"]
    made = with_labels(frame, ["prompts.file"])
    assert set(made["variant"]) == {"prompts a/prose.jsonl", "prompts b/prose.jsonl"}
    assert made["group"].nunique() == 2, "never taken for repeats of one setting"


@pytest.mark.parametrize(
    ("name", "section", "value", "words"),
    [
        ("top_k", "generation", 40, "top-k 40"),
        ("limit", "prompts", 3, "prompt limit 3"),
        ("max_tokens", "prompts", 8, "prompt tokens ≤ 8"),
    ],
)
def test_a_setting_that_is_null_differs_from_one_with_a_value(
    make_run: MakeRun, tmp_path: Path, name: str, section: str, value: int, words: str
) -> None:
    for run_id, chosen in (("a", None), ("b", value)):
        make_run(tmp_path / run_id, prompts=ONE, **{f"{section}__{name}": chosen})
    older = make_run(tmp_path / "c", prompts=ONE, **{f"{section}__{name}": value})
    config = yaml.safe_load((older / "config.yaml").read_text(encoding="utf-8"))
    del config[section][name]
    (older / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert set(labels(tmp_path)) >= {"β = 0", f"β = 0, {words}"}
    runs = load(str(tmp_path / "a"), str(tmp_path / "b"))
    assert list(runs.runs["group"]) == [0, 1], "never taken for repeats of one setting"
    known = load(str(tmp_path / "b"), str(tmp_path / "c"))
    assert list(known.runs["group"]) == [0, 0], "what was not recorded differs from nothing"


def test_a_setting_that_follows_from_another_is_not_named_unless_it_says_more(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for name, model, tokenizer, library in (
        ("a", "x", None, "stateful_gpt"),
        ("b", "y", "byte", "transformers"),
    ):
        changes = {"model__name": model, "model__tokenizer": tokenizer, "model__library": library}
        make_run(tmp_path / name, prompts=ONE, **changes)
    assert labels(tmp_path) == ["β = 0, model x", "β = 0, model y"]
    make_run(tmp_path / "c", prompts=ONE, model__name="x", model__tokenizer="byte")
    assert labels(tmp_path)[:2] == ["β = 0, model x", "β = 0, model x, model.tokenizer byte"]
    for name, solver, window in (("full", "full", None), ("windowed", "windowed", 4)):
        changes = {"recompute__solver": solver, "recompute__window": window}
        make_run(tmp_path / "solvers" / name, prompts=ONE, **changes)
    assert labels(tmp_path / "solvers") == ["β = 0, solver full", "β = 0, solver windowed"]
    for name, seed, drawn in (("a", 0, 0), ("b", 1, 1)):
        make_run(tmp_path / "seeds" / name, prompts=ONE, seed=seed, generation__seed=drawn)
    assert labels(tmp_path / "seeds") == ["β = 0, seed 0", "β = 0, seed 1"]
    make_run(tmp_path / "seeds" / "c", prompts=ONE, seed=1, generation__seed=2)
    assert labels(tmp_path / "seeds")[2] == "β = 0, seed 1, generation seed 2"


@pytest.mark.parametrize(
    "names",
    [
        ("m01", "m1"),
        ("x20261130191653123456", "x20261130191653123457"),  # no float tells them apart
        ("x", "²"),
    ],
)
def test_names_that_differ_in_the_spelling_of_a_number_are_different(
    make_run: MakeRun, tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in names:
        make_run(tmp_path / name, prompts=ONE, model__name=name)
    assert labels(tmp_path) == [f"β = 0, model {name}" for name in names]


def test_a_run_of_an_early_version_is_no_repeat_of_one_with_a_setting_it_did_not_know(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for name, changes in (
        ("early", {}),
        ("usual", {"generation__slide": 1, "feedback__hidden_strength": 0.0}),
        ("slides", {"generation__slide": 4, "feedback__hidden_strength": 0.0}),
        ("hidden", {"generation__slide": 1, "feedback__hidden_strength": 0.5}),
    ):
        make_run(tmp_path / name, prompts=ONE, **changes)
    for name, groups in (("usual", 1), ("slides", 2), ("hidden", 2)):
        runs = load(str(tmp_path / "early"), str(tmp_path / name)).runs
        assert runs["group"].nunique() == groups, name
    assert "generation.slide" not in load(str(tmp_path / "early")).runs
