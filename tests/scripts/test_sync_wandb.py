"""Uploading later: with the real client, to a server on the loopback that keeps what arrives."""

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.converge.publish import history_rows
from experiments.converge.run import converge
from experiments.converge.settings import ConvergeSettings
from experiments.runs.folder import RunFolder
from experiments.settings import parse
from experiments.tracking import tracker as tracking
from experiments.tracking.tracker import Tracker, stop_helper
from scripts import sync_wandb
from tests.forked import Forker
from tests.wandb_server import KEY, WandbServer, serving

Sync = Callable[..., tuple[int, str, str]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """A server, and a W&B that knows of nothing else."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Tracker, "server_failed", False)
    monkeypatch.setattr(sync_wandb, "PATIENCE", 60.0)
    with serving() as wandb_server:
        monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield wandb_server
    stop_helper()
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            del os.environ[name]


@pytest.fixture
def compute(checkpoint_folder: Path, tmp_path: Path, server: WandbServer) -> Callable[..., Path]:
    """A tiny run: its folder."""

    def run(mode: str, *, strength: float = 0.5, prompts: int = 1) -> Path:
        told = {
            "model": {"name": "checkpoint", "path": str(checkpoint_folder)},
            "feedback": {"strength": strength},
            "recompute": {"iterations": 6},
            "prompts": {"limit": prompts, "max_tokens": 8},
            "device": {"name": "cpu", "batch": 1},
            "tracking": {"mode": mode},
            "runs_dir": str(tmp_path / "runs"),
            "study": "s",
        }
        return converge(parse(told, ConvergeSettings))

    return run


@pytest.fixture
def study(compute: Callable[..., Path]) -> Path:
    """Two finished runs that W&B's server has never heard of; one of them without W&B's files."""
    compute("disabled", strength=1.0)
    return compute("offline").parent


@pytest.fixture
def sync(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sync:
    """``python -m scripts.sync_wandb`` with these words: exit code, output, error."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sync_wandb", *words])
        monkeypatch.setattr(Tracker, "server_failed", False)  # as in a process of its own
        capsys.readouterr()
        code = sync_wandb.main()
        return code, *capsys.readouterr()

    return call


def run_folders(study: Path) -> list[Path]:
    return sorted(path.parent for path in study.glob("*/status.json"))


def test_every_finished_run_is_uploaded_once_and_a_second_call_uploads_nothing(
    study: Path, sync: Sync, server: WandbServer
) -> None:
    folders = run_folders(study)
    unfinished = study / "0123456789"
    unfinished.mkdir()
    (unfinished / "status.json").write_text('{"state": "failed"}')
    code, out, err = sync(str(study))
    assert (code, err) == (0, "")
    assert out.endswith("2 uploaded, 0 were there already, 1 left out (not finished, or damaged)\n")
    assert sorted(server.runs) == [folder.name for folder in folders]
    for folder in folders:
        run = server.runs[folder.name]
        assert run.exit_code == 0
        assert [row["iteration"] for row in run.history if "iteration" in row] == [*range(1, 7)]
        stored = run.artifacts[f"run-{folder.name}"]
        assert stored["trajectory.parquet"] == (folder / "trajectory.parquet").read_bytes()

    asked = len(server.operations)
    code, out, err = sync(str(study))
    assert (code, err) == (0, "")
    assert out == "0 uploaded, 2 were there already, 1 left out (not finished, or damaged)\n"
    assert len(server.operations) == asked, "the server is not even asked"


@pytest.mark.parametrize("said", ["[]", "[1]", "{", "7"])
def test_a_note_of_an_upload_that_says_nothing_is_no_note(
    study: Path, sync: Sync, server: WandbServer, said: str
) -> None:
    for folder in run_folders(study):
        (folder / "wandb").mkdir(exist_ok=True)
        (folder / "wandb" / "synced.json").write_text(said)
    code, out, err = sync(str(study))
    assert (code, err, len(server.runs)) == (0, "", 2)
    assert out.endswith("2 uploaded, 0 were there already, 0 left out (not finished, or damaged)\n")


def test_a_run_whose_files_of_wandb_are_lost_adds_nothing_to_what_the_server_has(
    study: Path, sync: Sync, server: WandbServer
) -> None:
    sync(str(study))
    before = {name: run.history for name, run in server.runs.items()}
    for folder in run_folders(study):
        shutil.rmtree(folder / "wandb")
    code, out, _ = sync(str(study))
    assert (code, out.splitlines()[-1][:10]) == (0, "2 uploaded")
    assert {name: run.history for name, run in server.runs.items()} == before


def test_what_a_run_broken_off_online_lacks_arrives_when_it_is_uploaded_later(
    compute: Callable[..., Path], sync: Sync, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = RunFolder.keep

    def broken(self: RunFolder, first: int, *rest: Any) -> None:
        if first == 2:
            raise KeyboardInterrupt
        keep(self, first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "keep", broken)
        with pytest.raises(KeyboardInterrupt):
            compute("online", prompts=3)
    folder = compute("offline", prompts=3)
    assert sync(str(folder))[0] == 0
    history = server.runs[folder.name].history
    whole = [row for row in history if "iteration" in row and "settled_share" not in row]
    assert [row["nll"] for row in whole] == [row["nll"] for row in history_rows(folder)]
    assert {"page", "token_trajectories_table"} <= set(history[-1])


def test_a_damaged_run_is_left_out_and_the_others_are_uploaded(
    study: Path, sync: Sync, server: WandbServer
) -> None:
    first, second = run_folders(study)
    (first / "trajectory.parquet").write_bytes(b"")
    code, out, err = sync(str(study))
    assert (code, list(server.runs)) == (0, [second.name])
    assert err == f"warning: {first.name} is left out: unreadable trajectory.parquet\n"
    assert out.endswith("1 uploaded, 0 were there already, 1 left out (not finished, or damaged)\n")


def test_a_study_that_cannot_be_written_is_uploaded_whole(
    study: Path, sync: Sync, server: WandbServer
) -> None:
    for folder in run_folders(study):  # the study of somebody else, as far as root can show it
        (folder / "wandb").mkdir(exist_ok=True)
        (folder / "wandb" / "synced.json").mkdir()
    code, out, err = sync(str(study))
    assert (code, len(server.runs), out.splitlines()[-1][:10]) == (0, 2, "2 uploaded")
    assert err.count("so that another call uploads it again\n") == err.count("\n") == 2


def test_a_mistake_of_ours_keeps_its_traceback(
    study: Path, sync: Sync, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing: dict[Path, str] = {}
    monkeypatch.setattr("analysis.page.build.page_of_run", lambda folder: nothing[folder])
    with pytest.raises(KeyError):
        sync(str(study))
    assert [run.exit_code for run in server.runs.values()] == [1]
    assert not list(study.glob("*/wandb/synced.json"))


def test_a_configuration_of_something_else_is_one_sentence(
    study: Path, sync: Sync, server: WandbServer
) -> None:
    folder = run_folders(study)[0]
    (folder / "config.yaml").write_text("a: 1")
    status = json.loads((folder / "status.json").read_text())
    del status["checksums"]  # as of an early version
    (folder / "status.json").write_text(json.dumps(status))
    code, _, err = sync(str(study))
    assert code == 1
    said = f"{folder.name} is not: its config.yaml is not that of a convergence run"
    assert err == f"error: 0 of 2 runs are uploaded, {said}; the same command carries on\n"


def test_a_run_has_its_own_name_on_the_server_wherever_it_is_called_from(
    compute: Callable[..., Path], sync: Sync, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compute("disabled")
    monkeypatch.chdir(folder)
    assert sync(".")[0] == 0
    assert list(server.runs) == [folder.name]


def test_what_cannot_be_uploaded_is_one_sentence(study: Path, sync: Sync) -> None:
    said = "error: project must be 1 to 128 characters other than / \\ # ? % :, got 'a/b'\n"
    assert sync(str(study), "--project", "a/b") == (1, "", said)
    contest = Path(__file__).parents[1] / "fixtures" / "ca8ee83" / "old_contest"
    code, out, err = sync(str(contest))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "only convergence runs are uploaded here: wandb sync " in err


def test_what_a_shell_says_of_wandb_hides_no_key_and_the_terminal_shows_ours_alone(
    study: Path, server: WandbServer, forker: Forker
) -> None:
    for _ in range(2):  # the second time, W&B has rows to say that it has them already
        for folder in run_folders(study):
            shutil.rmtree(folder / "wandb", ignore_errors=True)
        env = {**os.environ, "WANDB_MODE": "offline"}
        env.pop("WANDB_SILENT", None)
        done = forker.run(["-m", "scripts.sync_wandb", str(study)], env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1].startswith("2 uploaded")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("API_KEY", "short", "WANDB_API_KEY invalid: API key must have 40+ characters, has 5."),
        ("MODE", "on", "1 validation error for Settings mode Input should be 'online', "),
    ],
)
def test_a_setting_of_wandb_that_cannot_be_is_one_sentence(
    study: Path, sync: Sync, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    stop_helper()  # it has read the environment
    monkeypatch.setenv(f"WANDB_{name}", value)
    code, out, err = sync(str(study))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: W&B says: {said}")


def test_who_uploads_to_no_server_hears_of_it_soon(
    study: Path, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_helper()  # it has read the environment
    monkeypatch.setattr(sync_wandb, "PATIENCE", 600.0)
    monkeypatch.setattr(tracking, "LONG_SECONDS", 2.0)  # a minute, for others
    began = time.monotonic()
    with socket.socket() as taken:  # a port where nothing listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        code, out, err = sync(str(study))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: 0 of 2 runs are uploaded, ")
    assert time.monotonic() - began < 300  # far below its patience


@pytest.mark.slow
def test_a_dead_server_is_one_sentence_and_the_same_command_carries_on(
    study: Path, sync: Sync, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_wandb, "PATIENCE", 5.0)
    first, second = run_folders(study)
    server.die = lambda request: second.name in request  # it takes the first run only
    code, out, err = sync(str(study))
    assert code == 1
    assert out.startswith(f"{first.name} is uploaded to team/stateful_gpt\n")
    assert err.startswith(f"error: 1 of 2 runs are uploaded, {second.name} is not: ")
    assert err.count("\n") == 1
    code, _, err = sync(str(study))
    assert code == 1
    assert err.startswith(f"error: 0 of 1 runs are uploaded, {second.name} is not: ")

    server.die = lambda request: False
    server.dead.clear()
    code, out, _ = sync(str(study))
    assert (code, out.splitlines()[-1]) == (
        0,
        "1 uploaded, 1 were there already, 0 left out (not finished, or damaged)",
    )


def test_a_folder_without_runs_is_one_sentence(tmp_path: Path, sync: Sync) -> None:
    assert sync(str(tmp_path)) == (
        1,
        "",
        f"error: {tmp_path} holds no runs: give a study folder, runs/STUDY\n",
    )
