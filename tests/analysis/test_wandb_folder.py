"""A W&B run on disk reads like its run folder; what is torn is read as far as it goes."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from wandb.proto.wandb_internal_pb2 import Record

from analysis import load
from analysis.__main__ import main
from analysis.draw.strength import headline
from analysis.draw.style import NotDrawn
from analysis.read.saved import ALL_PROMPTS, NotData, SourceError
from analysis.read.wandb_log import BLOCK, CHUNK_HEADER, FILE_HEADER, read_log

MakeRun = Callable[..., Path]
ONE = {"p": "one two three four five six"}
CONFIG = {
    "study": "sweep",
    "feedback": {"kind": "log_prob", "strength": 0.5},
    "recompute": {"iterations": 3},
    "reporting_tolerance": 1e-3,
}
HISTORY = [
    {"iteration": 1, "oracle_error_max": 3.0, "settled_prefix": 2.0, "nll": 4.0},
    {"iteration": 2, "oracle_error_max": 0.5, "settled_prefix": 3.5, "nll": 4.2, "step_max": 2.5},
    {"iteration": 3, "oracle_error_max": 0.0, "settled_prefix": 6.0, "nll": 4.3, "step_max": 0.5},
]
SUMMARY = {"outcome": "settled", "nll": 4.3, "nll_plain": 4.0, "iterations_to_tolerance": 3}


def chunks(content: bytes, room: int) -> bytes:
    """LevelDB's log format, written from its description: `room` bytes are left in the block."""
    written, first = b"", True
    while True:
        if room < CHUNK_HEADER:
            written += bytes(room)
            room = BLOCK
        part, content = content[: room - CHUNK_HEADER], content[room - CHUNK_HEADER :]
        kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[
            first, not content
        ]
        checksum = zlib.crc32(bytes([kind]) + part)
        written += checksum.to_bytes(4, "little") + len(part).to_bytes(2, "little")
        written += bytes([kind]) + part
        room -= CHUNK_HEADER + len(part)
        first = False
        if not content:
            return written


def write_log(path: Path, *records: Record) -> Path:
    written = b":W&B\xe1\xbe\x00"
    assert len(written) == FILE_HEADER
    for record in records:
        written += chunks(record.SerializeToString(), BLOCK - len(written) % BLOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(written)
    return path


def items(into: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        item = into.add()
        item.nested_key.append(key)
        item.value_json = json.dumps(value)


def run_record(run_id: str = "abc", config: dict[str, Any] = CONFIG, group: str = "g") -> Record:
    record = Record()
    record.run.run_id, record.run.project, record.run.run_group = run_id, "stateful_gpt", group
    for key, value in config.items():
        record.run.config.update.add(key=key, value_json=json.dumps(value))
    return record


def history_record(row: dict[str, Any]) -> Record:
    record = Record()
    items(record.history.item, row)
    return record


def summary_record(values: dict[str, Any]) -> Record:
    record = Record()
    items(record.summary.update, values)
    return record


def exit_record(code: int = 0) -> Record:
    record = Record()
    record.exit.exit_code = code
    record.exit.runtime = 1
    return record


def whole_log() -> list[Record]:
    rows = [history_record(row) for row in HISTORY]
    return [run_record(), *rows, summary_record(SUMMARY), exit_record()]


def write_offline(
    folder: Path, source: Path | None = None, *records: Record, run_id: str = "abc"
) -> Path:
    """`offline-run-*` with a log and, from a run folder, the copy of it that runs keep."""
    write_log(folder / f"run-{run_id}.wandb", *(records or whole_log()))
    (folder / "files").mkdir(exist_ok=True)
    (folder / "files" / "config.yaml").write_text("wandb_version: 1\n", encoding="utf-8")
    if source is not None:
        shutil.copytree(source, folder / "files" / "run_folder")
    return folder


# --- the log ------------------------------------------------------------------------------------


def test_a_log_gives_configuration_history_and_summary(tmp_path: Path) -> None:
    log = read_log(write_log(tmp_path / "run-abc.wandb", *whole_log()))
    assert (log.run_id, log.group, log.exit_code) == ("abc", "g", 0)
    assert log.config == CONFIG
    assert log.summary == SUMMARY
    assert log.history == HISTORY


def test_records_that_span_blocks_are_joined(tmp_path: Path) -> None:
    long = {"iteration": 1, "text": "x" * (3 * BLOCK)}
    # ends of records fall 0 to 8 bytes before the end of a block
    for short in range(BLOCK - 60, BLOCK - 20):
        padding = history_record({"text": "y" * short})
        path = write_log(tmp_path / "run-a.wandb", padding, history_record(long), exit_record())
        log = read_log(path)
        assert log.history[1] == long
        assert log.exit_code == 0


def test_a_torn_log_gives_the_whole_records_before_the_tear(tmp_path: Path) -> None:
    whole = write_log(tmp_path / "whole.wandb", *whole_log()).read_bytes()
    path, seen = tmp_path / "torn.wandb", []
    for size in range(FILE_HEADER, len(whole), 7):
        path.write_bytes(whole[:size])
        log = read_log(path)
        assert log.history == HISTORY[: len(log.history)]
        assert log.exit_code is None
        seen.append(len(log.history))
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2, 3}


def test_a_changed_byte_ends_the_reading_and_is_never_believed(tmp_path: Path) -> None:
    whole = write_log(tmp_path / "whole.wandb", *whole_log()).read_bytes()
    path = tmp_path / "changed.wandb"
    for at in range(FILE_HEADER, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        log = read_log(path)
        assert log.history == HISTORY[: len(log.history)]
        assert log.config in ({}, CONFIG)
        assert log.exit_code is None


def test_bytes_that_only_look_like_a_log_are_refused_or_empty(tmp_path: Path) -> None:
    path = tmp_path / "run-a.wandb"
    for content in (b"", b":W", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(NotData, match="no W&B log"):
            read_log(path)
    path.write_bytes(b":W&B\xe1\xbe\x00" + bytes(3 * BLOCK))  # a file that was laid out, not filled
    assert read_log(path).run_id is None
    not_a_record = b":W&B\xe1\xbe\x00" + chunks(b"\xff" * 50, BLOCK - FILE_HEADER)
    path.write_bytes(not_a_record)
    assert read_log(path).run_id is None


def test_values_that_are_not_json_are_left_out(tmp_path: Path) -> None:
    record = history_record({"iteration": 1})
    record.history.item.add(key="nll", value_json="{torn")
    record.history.item.add(key="deep", value_json="[" * 100_000)
    log = read_log(write_log(tmp_path / "run-a.wandb", record))
    assert log.history == [{"iteration": 1}]


# --- a W&B run with the copy of its run folder --------------------------------------------------


def same_frames(one: list[str], other: list[str]) -> None:
    first, second = load(*one), load(*other)
    for name in ("runs", "prompts", "iterations", "trajectory", "estimates"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))


def test_a_copied_wandb_run_reads_like_its_run_folder(make_run: MakeRun, tmp_path: Path) -> None:
    for name, strength in (("abc", 0.5), ("def", 1.0)):
        run = make_run(tmp_path / "runs" / name, prompts=ONE, feedback__strength=strength)
        write_offline(tmp_path / "copied" / f"offline-run-1-{name}", run, run_id=name)
    runs, copied = str(tmp_path / "runs"), str(tmp_path / "copied")
    same_frames([runs], [copied])
    each = [str(folder) for folder in sorted((tmp_path / "copied").iterdir())]
    same_frames([runs], each)
    same_frames([runs], [str(path) for path in sorted((tmp_path / "copied").rglob("*.wandb"))])


def test_a_wandb_folder_within_a_study_adds_nothing_and_alone_is_read(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "s" / "abc", prompts=ONE)
    write_offline(tmp_path / "s" / "wandb" / "offline-run-1-abc", run)
    write_offline(run / "wandb" / "offline-run-1-abc")
    runs = load(str(tmp_path / "s"))
    assert (len(runs.runs), runs.repeated, runs.left_out) == (1, (), ())
    shutil.rmtree(run)
    assert len(load(str(tmp_path / "s")).runs) == 1, "all that is left of the study"
    assert len(load(str(tmp_path / "s" / "wandb")).runs) == 1


def test_a_run_in_several_sources_counts_once_and_is_named(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "s" / "abc", study="sweep", prompts=ONE)
    offline = write_offline(tmp_path / "offline-run-1-abc", run)
    assert main(["table", str(tmp_path / "s"), str(offline)]) == 0
    assert capsys.readouterr().err == "Counted once: 1 run that lies in several places: abc.\n"


def test_the_more_complete_of_two_copies_counts(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "s" / "abc", study="sweep", prompts=ONE)
    history = write_offline(tmp_path / "offline-run-1-abc")
    for sources in ([run, history], [history, run]):
        runs = load(*map(str, sources))
        assert len(runs.runs) == 1
        assert runs.prompt_ids == ("p",)


# --- a W&B run without it -----------------------------------------------------------------------


def test_without_the_copy_the_history_gives_measures_over_all_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offline = write_offline(tmp_path / "offline-run-1-abc")
    runs = load(str(offline))
    assert list(runs.runs["run_id"]) == ["abc"]
    assert list(runs.runs["strength"]) == [0.5]
    assert runs.prompt_ids == (ALL_PROMPTS,)
    assert list(runs.iterations["oracle_error_max"]) == [3.0, 0.5, 0.0]
    assert list(runs.iterations["step_max"].isna()) == [True, False, False]
    assert main(["table", str(offline)]) == 0
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines() if " overall " in line]
    assert rows == [
        ["0.5", "overall", "–", "settled", "3", "–", "–", "4.3000", "+0.3000", "–", "–"]
    ]
    assert said.err == (
        "1 run has only W&B's history, which does not tell prompts apart: abc"
        " (no files/run_folder).\n"
    )


def test_what_a_run_that_was_not_chosen_lacks_is_not_told(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "s" / "whole", prompts=ONE)
    history = write_offline(tmp_path / "offline-run-1-abc")
    assert main(["table", str(run), str(history), "--run", "whole"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["table", str(run), str(history), "--run", "abc"]) == 0
    assert "does not tell prompts apart: abc" in capsys.readouterr().err


def test_a_seed_without_its_copy_is_pooled_with_the_others(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for seed, name in enumerate(("a", "b", "abc")):
        run = make_run(tmp_path / "made" / name, prompts=ONE, feedback__strength=0.5, seed=seed)
        config = yaml.safe_load((run / "config.yaml").read_text())
        copy = run if name != "abc" else None
        records = (run_record(name, config), *whole_log()[1:])
        write_offline(tmp_path / "in" / f"offline-run-1-{name}", copy, *records, run_id=name)
    runs = load(str(tmp_path / "in"))
    assert list(runs.runs["lacking"].isna()) == [True, True, False]
    assert set(runs.runs["group"]) == {0}


@pytest.mark.parametrize("name", ["status.json", "summary.json", "trajectory.parquet"])
def test_a_damaged_copy_falls_back_on_the_history(
    make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    run = make_run(tmp_path / "abc", prompts=ONE)
    offline = write_offline(tmp_path / "offline-run-1-abc", run)
    path = offline / "files" / "run_folder" / name
    path.write_bytes(path.read_bytes()[:-9])
    (saved,) = load(str(offline)).saved.values()
    assert saved.trajectory is None
    assert saved.lacking == f"unreadable {name}"


def test_measures_are_drawn_without_trajectories_and_the_rest_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, strength in (("a", 0.5), ("b", 1.0)):
        config = {**CONFIG, "feedback": {"kind": "log_prob", "strength": strength}}
        write_offline(
            tmp_path / "in" / f"offline-run-1-{name}",
            None,
            run_record(name, config),
            *whole_log()[1:],
            run_id=name,
        )
    assert main(["figures", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    drawn = {path.stem for path in (tmp_path / "out").iterdir()}
    assert drawn == {"headline", "settling"}
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in said[1:]] == ["regimes", "tokens"]


def test_runs_without_prompts_of_their_own_are_not_drawn_beside_those_with_them(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "in" / "whole", study="sweep", prompts=ONE, feedback__strength=1.0)
    write_offline(tmp_path / "in" / "offline-run-1-abc")
    assert main(["figures", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    why = "only its history of W&B was kept, which does not tell prompts apart"
    assert f"Not drawn: abc: {why}." in capsys.readouterr().err
    assert (tmp_path / "out" / "tokens.png").exists()


def test_a_log_that_breaks_off_gives_what_it_holds_and_no_outcome(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offline = write_offline(tmp_path / "offline-run-1-abc", None, *whole_log()[:3])
    runs = load(str(offline))
    assert list(runs.iterations["iteration"]) == [1, 2]
    assert runs.runs["outcome"].isna().all()
    assert runs.runs["nll"].isna().all(), "the last row of a torn history is not the end"
    assert main(["table", str(offline)]) == 0
    assert "abc (no files/run_folder, and its W&B log breaks off)" in capsys.readouterr().err


def test_nothing_is_said_of_the_end_of_runs_whose_logs_break_off(tmp_path: Path) -> None:
    for name, strength in (("a", 0.5), ("b", 1.0)):
        config = {**CONFIG, "feedback": {"kind": "log_prob", "strength": strength}}
        records = (run_record(name, config), *whole_log()[1:3])
        write_offline(tmp_path / f"offline-run-1-{name}", None, *records, run_id=name)
    with pytest.raises(NotDrawn, match="tell how they ended"):
        headline(load(str(tmp_path)))


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([], "its W&B log breaks off before the run begins"),
        ([run_record()], "no files/run_folder, and its W&B log breaks off, and no history"),
        ([*whole_log()[:-1], exit_record(1)], "failed"),
        ([run_record(), history_record({"iteration": "x", "nll": [1]}), exit_record()], "no hist"),
    ],
)
def test_a_log_without_measures_or_of_a_failure_is_left_out_with_the_reason(
    tmp_path: Path, records: list[Record], reason: str
) -> None:
    write_log(tmp_path / "in" / "offline-run-1-abc" / "run-abc.wandb", *records)
    with pytest.raises(SourceError, match="there is no finished run") as caught:
        load(str(tmp_path / "in"))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_batches_and_steps_are_never_mixed(tmp_path: Path) -> None:
    # two batches, told as they were computed, and the whole run, which settled sooner than one
    told = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (1, 2.0), (2, 2.0), (1, 3.0), (2, 3.0)]
    rows = [history_record({"iteration": number, "nll": nll}) for number, nll in told]
    offline = write_offline(tmp_path / "offline-run-1-abc", None, run_record(), *rows)
    found = load(str(offline)).iterations
    assert list(zip(found["iteration"], found["nll"], strict=True)) == [(1, 3.0), (2, 3.0)]


def test_odd_values_in_a_log_are_missing_and_harm_nobody(tmp_path: Path) -> None:
    rows = [
        {"iteration": 10**30, "nll": 1.0},
        {"iteration": True, "nll": 1.0},
        {"iteration": 2, "nll": {"deep": [1]}, "step_max": "NaN", "run": 7},
        {"iteration": 2, "nll": 5.0},
    ]
    config = {"study": ["s"], "feedback": [1, {"a": 2}], "reporting_tolerance": {"x": 1}}
    summary = {"outcome": {"a": 1}, "run": 5, "prompt_id": "p", "nll": [3], "_runtime": 4}
    records = [run_record(config=config), *map(history_record, rows), summary_record(summary)]
    offline = write_offline(tmp_path / "offline-run-1-abc", None, *records, exit_record())
    runs = load(str(offline))
    assert list(runs.iterations["nll"][runs.iterations["iteration"] == 2]) == [5.0]
    assert runs.prompt_ids == (ALL_PROMPTS,)
    assert list(runs.runs.index) == [0]
    assert main(["table", str(offline)]) == 0
