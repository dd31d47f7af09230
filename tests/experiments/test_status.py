"""Nothing hides: what is done, running, failed and missing, and how to complete it."""

import errno
import fcntl
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import status
from experiments.sweeps.report import MOST_ROWS, names_of, report
from experiments.sweeps.study import Plan, Run, State, Study, survey

Called = tuple[int, str, str]
Call = Callable[..., Called]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """``python -m experiments.status`` with these words."""

    def call(*words: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["status", *map(str, words)])
        capfd.readouterr()
        try:
            code = status.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def sweep(in_process: Call, settings: list[str]) -> Call:
    def call(*words: str) -> Called:
        return in_process("converge", "-m", *settings, *words)

    return call


def test_a_complete_study_is_a_table_and_exit_code_0(
    sweep: Call, ask: Call, tmp_path: Path
) -> None:
    code, out, _ = sweep("feedback.strength=0,1")
    assert code == 0
    shown = ask(tmp_path / "runs" / "s")
    assert shown[0] == 0
    assert shown[1].strip() in out, "the end of a sweep is the same report"
    assert "2 runs: 2 finished" in shown[1]
    assert "Complete it" not in shown[1]


def test_what_is_not_finished_is_listed_with_its_reason_and_the_command(
    sweep: Call, ask: Call, tmp_path: Path, runs: Callable[[], list[Path]]
) -> None:
    (tmp_path / "far.jsonl").write_text('{"id": "a", "tokens": [999]}\n')
    (tmp_path / "near.jsonl").write_text('{"id": "a", "tokens": [1, 2, 3, 4, 5]}\n')
    files = f"{tmp_path / 'far.jsonl'},{tmp_path / 'near.jsonl'},{tmp_path / 'nowhere.txt'}"
    code, out, err = sweep("feedback.strength=0,1", f"prompts.file={files}")
    assert code == 1
    assert err.count("error: ") == len(err.splitlines()) == 4
    study = tmp_path / "runs" / "s"
    one = next(path for path in runs() if (path / "summary.json").exists())
    for name in ("summary.json", "trajectory.parquet"):
        (one / name).unlink()
    content = json.loads((one / "status.json").read_text())
    (one / "status.json").write_text(json.dumps({**content, "state": "running"}))
    code, shown, _ = ask(study)
    assert code == 1
    assert "6 runs: 1 finished, 1 interrupted, 4 failed" in shown
    assert re.search(rf"^{one.name}  .*  interrupted$", shown, re.MULTILINE)
    assert len(re.findall(r"failed: .*999", shown)) == 2
    assert len(re.findall(r"^–  .*failed: .*nowhere\.txt", shown, re.MULTILINE)) == 2

    with (one / ".lock").open("w") as stream:  # somebody computes it
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "1 finished, 1 running, 4 failed" in ask(study)[1]

    shutil.rmtree(one)
    assert "1 finished, 4 failed, 1 missing" in ask(study)[1]

    (tmp_path / "far.jsonl").write_text('{"id": "a", "tokens": [9]}\n')
    (tmp_path / "nowhere.txt").write_text("somewhere")
    (command,) = re.findall(r"^Complete it:  (.*)$", shown, re.MULTILINE)
    words = shlex.split(command)
    assert words[-1] == f"prompts.file={files}"
    code, out, _ = sweep("feedback.strength=0,1", f"prompts.file={files}")
    assert code == 0
    assert "6 runs: 6 finished" in out
    assert ask(study)[0] == 0


def test_a_larger_grid_takes_the_place_of_the_smaller_in_the_command(
    sweep: Call, ask: Call, tmp_path: Path, runs: Callable[[], list[Path]]
) -> None:
    sweep("feedback.strength=0,1")
    sweep("feedback.strength=0,1,2")
    for folder in runs():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    _, shown, _ = ask(tmp_path / "runs" / "s")
    assert "3 runs: 3 missing" in shown
    (command,) = re.findall(r"^Complete it:  (.*)$", shown, re.MULTILINE)
    assert "feedback.strength=0,1,2" in command


def test_a_single_run_that_broke_off_names_its_own_command(
    in_process: Call, settings: list[str], ask: Call, runs: Callable[[], list[Path]]
) -> None:
    in_process("converge", *settings)
    (folder,) = runs()
    (folder / "summary.json").unlink()
    (folder / "summary.json").mkdir()  # in the way of the last file
    (folder / "status.json").unlink()
    assert in_process("converge", *settings)[0] == 1
    code, shown, _ = ask(folder.parent)
    assert code == 1
    assert "1 run: 1 failed" in shown
    assert "study=s" in re.findall(r"^Complete it:  (.*)$", shown, re.MULTILINE)[0]


@pytest.mark.parametrize("words", [["-m", "feedback.strength=0,1"], ["feedback.strength=0"]])
def test_a_study_that_was_moved_is_completed_where_it_lies(
    in_process: Call, settings: list[str], ask: Call, tmp_path: Path, words: list[str]
) -> None:
    assert in_process("converge", *settings, *words)[0] == 0
    there = tmp_path / "an, other" / "2024_11_30"  # as a number, 20241130
    there.parent.mkdir()
    shutil.move(tmp_path / "runs" / "s", there)
    for file in there.glob("*/config.yaml"):
        file.write_text("{")
    (command,) = re.findall(r"^Complete it:  (.*)$", ask(there)[1], re.MULTILINE)
    code, out, _ = in_process("converge", *shlex.split(command)[3:])
    assert code == 0, out
    assert ask(there)[0] == 0
    assert not (tmp_path / "runs" / "s").exists()


def test_the_command_that_draws_names_a_folder_after_the_study(
    sweep: Call, ask: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep("feedback.strength=0,1")
    monkeypatch.chdir(tmp_path / "runs" / "s")
    assert ask(".")[1].endswith("python -m analysis figures . --out figures/s\n")


@pytest.mark.parametrize("name", ["nowhere", "file", "empty"])
def test_what_is_no_study_is_one_sentence(ask: Call, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    code, out, err = ask(tmp_path / name)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: STUDY must be .+\n", err)
    assert name in err


def test_no_argument_and_too_many_are_exit_code_2(ask: Call) -> None:
    assert ask()[0] == 2
    assert ask("a", "b")[0] == 2


def test_a_dry_run_lists_all_and_computes_and_writes_nothing(
    in_process: Call, settings: list[str], sweep: Call, tmp_path: Path
) -> None:
    code, out, err = in_process("converge", "-m", *settings, "feedback.strength=0,1", "--dry-run")
    assert (code, err) == (0, "")
    assert "2 runs: 2 missing" in out
    assert not (tmp_path / "runs").exists()
    sweep("feedback.strength=1")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, out, err = sweep("feedback.strength=0,1", "--dry-run")
    assert (code, err) == (0, "")
    assert re.search(r"^[0-9a-f]{10}  log_prob β=0 n=12  .*missing$", out, re.MULTILINE)
    assert re.search(r"^[0-9a-f]{10}  log_prob β=1 n=12  .*settled$", out, re.MULTILINE)
    assert "2 runs: 1 finished, 1 missing" in out
    code, out, _ = in_process("converge", *settings, "feedback.strength=1", "--dry-run")
    assert code == 0
    assert "1 run: 1 finished" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_dry_run_says_what_cannot_be(sweep: Call, tmp_path: Path) -> None:
    code, out, err = sweep(f"prompts.file={tmp_path / 'nowhere.txt'}", "--dry-run")
    assert code == 2
    assert re.fullmatch(r"error: prompts.file .*nowhere.txt.*\n", err)
    assert "1 run: 1 failed" in out


def test_where_files_have_no_locks_a_run_is_computed_with_one_warning(
    compute: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # as Lustre without -o flock says

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = compute()
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert not (folder / ".lock").exists()
    assert re.fullmatch(r"warning: .* no locks: .*\n", capfd.readouterr().err)
    content = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**content, "state": "running"}))
    (folder / ".lock").write_text("")
    assert [run.state for run in survey(folder.parent).runs] == [State.RUNNING], "as it says itself"


# --- on a screen --------------------------------------------------------------------------------


def run_of(number: int, state: State) -> Run:
    config = {
        "feedback": {"kind": "log_prob", "strength": 0.5},
        "recompute": {"iterations": 8, "damping": 1.0, "start": "cold"},
        "generation": {"max_new_tokens": 0},
        "seed": number,
    }
    return Run(f"{number:010x}", state, None, config, None, None)


def test_the_report_of_a_big_study_stays_on_a_screen() -> None:
    runs = [run_of(number, State.FINISHED) for number in range(5000)]
    runs += [run_of(number, State.MISSING) for number in range(5000, 9000)]
    text = report(Study(Path("runs/big"), tuple(runs), ()))
    assert len(text.splitlines()) < 2 * MOST_ROWS + 15
    assert "4960 more:  python -m analysis table runs/big" in text
    assert "3960 more that are not finished" in text
    assert "9000 runs: 5000 finished, 4000 missing" in text


def test_a_command_that_is_not_repeated_is_spoken_of() -> None:
    plan = Plan("python -m experiments.converge -m 'hydra.launcher.setup=[a]'", "", ())
    text = report(Study(Path("runs/s"), (run_of(1, State.MISSING),), (plan,)))
    assert text.endswith("\nThe command of this sweep has settings that are not repeated here")
    assert "setup" not in text


def test_runs_are_told_apart_by_whatever_differs() -> None:
    configs = [run_of(number, State.FINISHED).config for number in (3, 4)]
    for config, drawn in zip(configs, (3, 5), strict=True):
        config["generation"]["seed"] = drawn
    assert names_of(configs) == [
        "log_prob β=0.5 n=8 seed=3",  # what is drawn follows from it
        "log_prob β=0.5 n=8 generation.seed=5 seed=4",
    ]


def test_files_of_ours_that_are_damaged_hide_no_run(
    sweep: Call, tmp_path: Path, runs: Callable[[], list[Path]]
) -> None:
    sweep("feedback.strength=0,1")
    study = tmp_path / "runs" / "s"
    (plan,) = (study / ".sweep" / "plans").iterdir()
    plan.write_text('{"command": "python", "wri')
    for folder in runs():
        (folder / "config.yaml").write_bytes(b"\x00")
        (folder / "status.json").write_bytes(b"{")
    found = survey(study)
    assert [run.state for run in found.runs] == [State.INTERRUPTED] * 2
    assert "2 runs: 2 interrupted" in report(found)
