"""The runners, called as from a shell but in this process, on a tiny model of bytes."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import experiments.converge.run
from experiments.converge.settings import ConvergeSettings
from experiments.runs import compute_once
from experiments.settings import parse
from experiments.tracking import tracker as tracking
from experiments.tracking.tracker import Tracker, stop_helper
from stateful_gpt.checkpoint import save_checkpoint
from stateful_gpt.model import GPT
from tests.forked import Forked, Forker
from tests.wandb_server import KEY, WandbServer, serving

Called = tuple[int, str, str]
Converge = Callable[..., Called]
Compute = Callable[..., Path]
Command = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def committed_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run stores does not depend on whether somebody edits the source just now."""
    monkeypatch.setattr(compute_once, "changes", lambda: None)


@pytest.fixture
def in_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Called]]:
    """Call a runner's main() with these words: exit code, standard output, standard error."""
    environment = dict(os.environ)

    def call(module: str, *words: str) -> Called:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [module, *words])
        capfd.readouterr()
        try:
            code = importlib.import_module(f"experiments.{module}.__main__").main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    yield call
    # the tracker and Hydra set variables for the process they think is theirs
    for name in set(os.environ) - set(environment):
        if name.startswith(("WANDB_", "HYDRA_", "PYTHONIOENCODING")):
            del os.environ[name]


@pytest.fixture
def settings(checkpoint_folder: Path, tmp_path: Path) -> list[str]:
    """Overrides of a run that takes a few hundredths of a second, into ``tmp_path / "runs"``."""
    return [
        "model=checkpoint",
        f"model.path={checkpoint_folder}",
        "device=cpu",
        "tracking.mode=disabled",
        "prompts.limit=2",
        "prompts.max_tokens=12",
        "recompute.iterations=12",
        f"runs_dir={tmp_path / 'runs'}",
        "study=s",
    ]


@pytest.fixture(scope="session")
def stateful_folder(make_gpt: Callable[..., GPT], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes with a gate for hidden states."""
    folder = tmp_path_factory.mktemp("stateful") / "tiny"
    model = make_gpt(9, block_size=32, vocab_size=257, hidden_feedback=True, dtype=torch.float32)
    save_checkpoint(model, folder, tokenizer="byte", trained_passes=3)
    return folder


@pytest.fixture
def converge(in_process: Callable[..., Called], settings: list[str]) -> Converge:
    """``python -m experiments.converge`` with the tiny settings, then these."""

    def call(*overrides: str) -> Called:
        return in_process("converge", *settings, *overrides)

    return call


@pytest.fixture
def compute(settings: list[str]) -> Compute:
    """The same run without Hydra, which takes longer than the run: its folder."""

    def call(*overrides: str) -> Path:
        config: dict[str, Any] = {}
        for word in (*settings, *overrides):
            key, value = word.split("=", 1)
            # a group's name stands for the name that its choice sets
            config[{"model": "model.name", "device": "device.name"}.get(key, key)] = value
        told = OmegaConf.from_dotlist([f"{key}={value}" for key, value in config.items()])
        plain: Any = OmegaConf.to_container(told)
        return experiments.converge.run.converge(parse(plain, ConvergeSettings))

    return call


@pytest.fixture
def command(settings: list[str]) -> Command:
    """The same as words for a process of its own."""

    def words(*overrides: str) -> list[str]:
        return [sys.executable, "-m", "experiments.converge", *settings, *overrides]

    return words


@pytest.fixture
def start(forker: Forker) -> Iterator[Callable[..., Forked]]:
    """Start a process that leads a group of its own; the group is gone after the test."""
    started: list[Forked] = []

    def run(words: list[str], **environment: str) -> Forked:
        assert words[0] == sys.executable
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        started.append(forker.start(words[1:], env=env))
        return started[-1]

    yield run
    for process in started:
        process.kill()


@pytest.fixture
def runs(tmp_path: Path) -> Callable[[], list[Path]]:
    """The run folders of the study, by name."""

    def find() -> list[Path]:
        study = tmp_path / "runs" / "s"
        return sorted(p for p in study.glob("[!.]*") if p.is_dir() and p.name != "wandb")

    return find


def _mount(*words: str | Path) -> None:
    try:
        subprocess.run(["mount", *words], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs rights that this user has not")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Make a file system with room for so many KiB."""
    place = tmp_path / "disk"

    def mount(size: int) -> Path:
        place.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place)
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def freeze() -> Iterator[Callable[[Path], None]]:
    """Make a folder a file system that cannot be written."""
    frozen: list[Path] = []

    def mount(folder: Path) -> None:
        for how in (["--bind", folder], ["-o", "remount,bind,ro"]):
            _mount(*how, folder)
            frozen.append(folder)

    yield mount
    for folder in set(frozen):
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def status() -> Callable[[Path], dict[str, Any]]:
    def read(folder: Path) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        return content

    return read


@pytest.fixture
def quiet_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B without an account, a key or settings of the user's, and nothing known of its server."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("CONFIG", "CACHE"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setattr(Tracker, "server_failed", False)
    yield
    stop_helper()  # it read the environment when it was started


@pytest.fixture
def wandb_server(quiet_wandb: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that takes runs, and patience for a machine with other things to do."""
    monkeypatch.setattr(tracking, "INIT_SECONDS", 60.0)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 60.0)
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
