"""A run is computed once, by one process; however it ends, that is written down."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import experiments.converge.run as runner
from experiments.converge.settings import ConvergeSettings, GenerationSettings
from experiments.runs import compute_once, lock
from experiments.runs import folder as run_folder
from experiments.runs.compute_once import ALONE, RunError
from experiments.runs.files import write_json
from experiments.runs.folder import RunFolder, origin_of_part, read_status

ROOT = Path(__file__).parents[2]
Called = tuple[int, str, str]
Status = Callable[[Path], dict[str, Any]]


class NoTracker:
    def finish(self, *, failed: bool = False) -> None: ...


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "s" / "abc", {"study": "s"})


def attempt(
    folder: RunFolder, compute: Callable[[object], object], tell: Any = lambda: None
) -> None:
    def computed(tracker: object) -> Any:
        compute(tracker)
        return tell

    compute_once.compute_once(
        folder,
        asked=ALONE,
        device=torch.device("cpu"),
        open_tracker=NoTracker,
        compute=computed,
        shorten="prompts.max_tokens",
    )


def broken(_: object) -> None:
    raise RuntimeError("a bug")


def test_a_mistake_of_ours_keeps_its_traceback(
    folder: RunFolder, status: Status, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match="a bug"):
        attempt(folder, broken)
    trace = (folder.path / "traceback.txt").read_text()
    assert "in broken" in trace
    assert trace in capsys.readouterr().err
    error = status(folder.path)["error"]
    assert error == f"RuntimeError: a bug (see {folder.path / 'traceback.txt'})"
    attempt(folder, lambda _: None)
    assert not (folder.path / "traceback.txt").exists(), "it is history"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "cannot be written (No space left on device)"),
        (torch.OutOfMemoryError("x"), "the device's memory does not hold the run"),
        (MemoryError(), "the machine's memory does not hold the run"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "use a smaller prompts"),
    ],
)
def test_disk_and_memory_are_a_sentence(
    folder: RunFolder,
    status: Status,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    said: str,
) -> None:
    def fail(_: object) -> None:
        raise error

    with pytest.raises(RunError):
        attempt(folder, fail)
    assert said in status(folder.path)["error"]
    assert not (folder.path / "traceback.txt").exists()
    assert capsys.readouterr().err == ""


def test_a_computed_run_is_finished_also_where_nobody_can_be_told(
    folder: RunFolder, status: Status, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(folder, lambda _: None, lambda: broken(None))
    assert status(folder.path)["state"] == "finished"
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "warning: " in err.splitlines()[-1]


def test_a_mistake_in_a_sweep_is_in_the_table_with_its_traceback(
    in_process: Callable[..., Called], settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise RuntimeError("a bug before there is a folder")

    monkeypatch.setattr(runner, "encode_prompts", wrong)
    code, out, err = in_process("converge", "-m", *settings, "feedback.strength=0,1")
    assert code == 1
    assert err.count("Traceback") == 2
    assert "2 runs: 2 failed" in out
    lines = [line for line in out.splitlines() if "failed: RuntimeError" in line]
    assert len(lines) == 2
    for line in lines:
        assert "in wrong" in Path(line.partition("(see ")[2].rstrip(")")).read_text()


def test_kept_prompts_say_where_they_came_from(
    compute: Callable[..., Path],
    status: Status,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    done: list[str] = []
    keep = RunFolder.keep

    def keep_one(self: RunFolder, number: int, *parts: Any) -> None:
        if number == 1 and not done:
            done.append("broken off")
            raise OSError(28, "No space left on device")
        keep(self, number, *parts)

    monkeypatch.setattr(RunFolder, "keep", keep_one)
    origin = compute_once.provenance(torch.device("cpu"))
    before = {**origin, "commit": "before", "changes": {"sha256": "before"}}
    device = origin["device"].removesuffix(f", {origin['threads']} threads")
    before |= {"threads": 77, "device": f"{device}, 77 threads"}  # the same processor
    monkeypatch.setattr(compute_once, "provenance", lambda _: before)

    def early(status: dict[str, Any]) -> dict[str, Any]:  # whose device said the threads
        return {**origin_of_part(status), "device": status["device"]}

    monkeypatch.setattr(run_folder, "origin_of_part", early)
    with pytest.raises(RunError):
        compute("device.batch=1")
    monkeypatch.setattr(run_folder, "origin_of_part", origin_of_part)
    monkeypatch.setattr(compute_once, "provenance", lambda _: {**origin, "commit": "now"})
    capfd.readouterr()
    folder = compute("device.batch=1")
    (kept,) = status(folder)["kept"]
    assert kept["origin"]["commit"] == "before"
    assert kept["origin"]["device"] == device
    assert status(folder)["commit"] == "now"
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "1 of its prompts were computed by an earlier attempt" in err
    named = "another commit, other threads, other uncommitted changes"
    assert f"attempt with {named}; status.json says" in err


def test_a_new_file_that_is_no_source_is_no_change(
    compute: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Such as a table that was written into the checkout between two attempts."""
    origin = compute_once.provenance(torch.device("cpu"))
    found = [None, {"sha256": "of nothing", "bytes": 0}]
    monkeypatch.setattr(
        compute_once, "provenance", lambda _: {**origin, "changes": found.pop(0), "dirty": None}
    )
    with monkeypatch.context() as once:
        once.setattr(RunFolder, "assemble", broken)  # with every prompt kept
        with pytest.raises(RuntimeError, match="a bug"):
            compute()
    capfd.readouterr()
    compute()
    assert capfd.readouterr().err == ""


def test_a_run_is_finished_before_its_kept_prompts_go(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.path / ".prompts").mkdir(parents=True)
    folder.begin({})
    monkeypatch.setattr("experiments.runs.folder.shutil.rmtree", broken)  # killed at this moment
    with pytest.raises(TypeError):
        folder.finish()
    assert read_status(folder.path)["state"] == "finished"
    monkeypatch.undo()
    folder.tidy()
    assert not (folder.path / ".prompts").exists()


# --- files --------------------------------------------------------------------------------------


def test_a_lock_neither_follows_a_link_nor_empties_a_file(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(precious)
    with pytest.raises(OSError), lock.locked(run):  # noqa: PT011
        pytest.fail("held through a link")
    RunFolder(run, {}).tidy()
    assert precious.read_text() == "mine"
    (run / ".lock").unlink()
    os.link(precious, run / ".lock")
    with lock.locked(run):
        assert lock.is_held(run)
    assert precious.read_text() == "mine"


def test_files_have_the_rights_that_the_umask_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", broken)  # it is the process's, and threads share it
        write_json(tmp_path / "a.json", {})
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


# --- random numbers, and a start without torch ---------------------------------------------------


def test_no_prompt_of_one_seed_draws_like_a_prompt_of_another() -> None:
    def seed_of(seed: int, inner: int, prompt: int) -> int:
        settings = ConvergeSettings(seed=seed, generation=GenerationSettings(seed=inner))
        return runner.generator(settings, prompt, torch.device("cpu")).initial_seed()

    seeds = [
        seed_of(seed, inner, number)
        for seed in (0, 1, 2)
        for inner in (0, 1, 2)
        for number in (0, 1, 1008, 1009, 2018)
    ]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("experiments.status nowhere", 2),
        ("experiments.status --help", 0),
        ("experiments.converge --help", 0),
        (f"experiments.converge --help feedback={'a' * 300}", 0),
        ("experiments.converge --cfg job", 0),
        ("experiments.converge feedback.strenth=1", 2),
        ("experiments.converge -m feedback.strength=0,x", 2),
        ("experiments.train --help", 0),
        ("experiments.train --cfg job", 0),
        ("experiments.train training.steps=0", 2),
        ("stateful_gpt.generate --help", 0),
        ("stateful_gpt.generate --prompt x --strength abc", 2),
    ],
)
def test_a_command_that_computes_nothing_imports_nothing_slow(
    command: str, code: int, tmp_path: Path
) -> None:
    module, *words = command.split()
    program = (
        "import runpy, sys\n"
        f"sys.argv = {[module, *words]!r}\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n"
        "    slow = {'torch', 'wandb', 'pandas', 'pyarrow', 'numpy'}\n"
        "    print(f'exit {stop.code or 0}', *slow & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"exit {code}", done.stdout + done.stderr


def test_the_name_of_a_state_tracking_run_and_its_commands(
    in_process: Callable[..., Called], tmp_path: Path
) -> None:
    words = ["device=cpu", "tracking.mode=disabled", "task.trained_level=2", "task.tested_level=3"]
    words += ["size.n_embd=8", "training.steps=2", "training.batch_size=2", "test_words=4"]
    words += [f"runs_dir={tmp_path}", "study=s"]
    code, out, err = in_process("state_tracking", "-m", *words, "seed=0,1")
    assert (code, err) == (0, "")
    assert "run 2 of 2: " in out
    assert "plain, 1 layer; cups, state seed=1" in out
    assert f"Draw it:  python -m analysis figures {tmp_path / 's'}" in out
    commands = {
        json.loads(path.read_text())["command_of_this_run"] for path in tmp_path.glob("s/*/status*")
    }
    beginning = f"python -m experiments.state_tracking {words[0]} "
    assert all(command.startswith(beginning) for command in commands)
    assert {command.split()[-1] for command in commands} == {"seed=0", "seed=1"}
