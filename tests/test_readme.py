"""What the README shows runs as it stands there, in Python and in a shell.

Shell examples run in this process, a block after the other as they stand, on less text. What cannot
run here is in ELSEWHERE, with the reason.
"""

import glob
import os
import pickle
import pty
import re
import runpy
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from tests.conftest import MakeGPT
from tests.forked import Forker

ROOT = Path(__file__).parents[1]
OLD = ROOT / "tests/fixtures/ca8ee83/old"  # a study
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    [words for line in block.replace("\\\n", "").splitlines() if (words := shlex.split(line, True))]
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
]
MODULE = ["python", "-m"]

ELSEWHERE = {
    ". .venv/bin/activate": "is the shell's own",
    "pip install": "needs a network",
    "python -m scripts.prepare_corpus": "needs a network; tests/scripts/test_prepare_corpus.py",
    "python -m scripts.benchmark": "takes minutes; tests/scripts/test_benchmark.py",
    "wandb leet runs/mine/wandb": "needs a terminal, which a test below makes",
    "python -m experiments.converge tracking.mode=online": "needs an account; test_tracking_online",
    "python -m scripts.sync_wandb runs/mine": "needs an account; tests/scripts/test_sync_wandb.py",
    "python -m scripts.make_dashboard": "needs an account; tests/scripts/test_make_dashboard.py",
    "wandb sweep": "needs an account; tests/experiments/test_wandb_sweep.py",
    "python -m analysis table wandb:ENTITY/PROJECT/STUDY": "needs an account; test_wandb_server",
}
GROUPS = ("pip install", "python -m scripts.benchmark", "python -m scripts.make_dashboard")
GROUPS += ("wandb sweep",)  # with whatever follows

QUIET = ["device=cpu", "tracking.mode=disabled"]
ONE = "hydra.sweeper.processes=1"  # this process has threads, of which a fork must not
SHORT = [*QUIET, "prompts.limit=1", "prompts.max_tokens=16", ONE]
LESS = {
    "python -m experiments.converge": SHORT,
    "python -m experiments.converge -m experiment=names_feedback": [*QUIET, ONE],
    "python -m experiments.converge -m hydra/launcher=joblib": [*SHORT, "hydra.launcher.n_jobs=1"],
    "python -m experiments.converge -m model=checkpoint": QUIET,
    "python -m experiments.train": [
        *QUIET,
        *("training.steps=2", "training.evaluate_every=2", "training.evaluate_windows=2"),
        *("training.final_windows=2", "training.batch_size=2"),
    ],
    "python -m stateful_gpt.generate": ["--max_new_tokens", "2"],
}


def elsewhere(words: list[str]) -> str | None:
    """The entry of ELSEWHERE that a command falls under."""
    line = shlex.join(words)
    return next((e for e in ELSEWHERE if line == e or (e in GROUPS and line.startswith(e))), None)


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process, on less; it must end with 0."""
    assert words[:2] == MODULE, words
    line = shlex.join(words)
    longest = max((start for start in LESS if line.startswith(start)), key=len, default="")
    found = [path for word in words[3:] for path in sorted(glob.glob(word)) or [word]]
    monkeypatch.setattr(sys, "argv", [words[2], *found, *LESS.get(longest, [])])
    GlobalHydra.instance().clear()
    code: object = 0
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    assert not code, line


@pytest.fixture
def home(tmp_path: Path, make_gpt: MakeGPT, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, and one of nanoGPT's beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what launchers would set
    before, threads = dict(os.environ), torch.get_num_threads()
    out, data = Path("nanoGPT/out-shakespeare-char"), Path("nanoGPT/data/shakespeare_char")
    out.mkdir(parents=True)
    data.mkdir(parents=True)
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 4
    letters = sorted(set(text))
    table = {letter: number for number, letter in enumerate(letters)}
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": table}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    (data / "input.txt").write_text(text)
    shape = {"block_size": 96, "vocab_size": len(letters), "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = make_gpt(3, bias=False, dtype=torch.float32, **shape)
    arguments = {**shape, "bias": False, "dropout": 0.2}
    content = {"model": model.state_dict(), "model_args": arguments, "iter_num": 5, "config": {}}
    torch.save(content, out / "ckpt.pt")
    for part in ("train", "held_out", "validation"):  # in place of the novels
        novels = Path("here/data/austen", part)
        novels.mkdir(parents=True)
        words = (f"{first}{second}" for first in letters for second in letters)
        (novels / "novel.txt").write_text(f"{text} {' '.join(words)}\n" * 8)
    monkeypatch.chdir("here")
    yield tmp_path / "here"
    torch.set_num_threads(threads)
    for name in set(os.environ) - set(before):
        if name.startswith(("WANDB_", "HYDRA_")):
            del os.environ[name]


def make_mine(forker: Forker) -> None:
    """The study that most examples are about, and a W&B run of it that was copied elsewhere."""
    words = ["experiments.converge", "study=mine", "tracking.mode=offline", *SHORT[:1], *SHORT[2:]]
    # a process of its own, which does not hear of the helper that earlier tests' W&B has started
    environment = {key: value for key, value in os.environ.items() if "WANDB" not in key}
    done = forker.run(["-m", *words], env=environment, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert list(Path("runs/mine").rglob("run-*.wandb")), done.stderr
    Path("runs/copied").mkdir()
    for folder in Path("runs/mine").rglob("offline-run-*"):
        if folder.is_dir():
            shutil.copytree(folder, Path("runs/copied", folder.name))


WALK = next(block for block in BLOCKS if "nanoGPT/" in str(block))
HERE = [
    pytest.param(commands, id=shlex.join(commands[0]))
    for block in BLOCKS
    if block is not WALK and (commands := [words for words in block if elsewhere(words) is None])
]


@pytest.mark.parametrize("commands", HERE)
def test_the_commands_of_a_block_run(
    commands: list[list[str]], home: Path, monkeypatch: pytest.MonkeyPatch, forker: Forker
) -> None:
    if not any("study=mine" in words for words in commands) and "runs/mine" in str(commands):
        make_mine(forker)
    for words in commands:
        run(words, monkeypatch)


@pytest.mark.slow
def test_the_terminal_shows_the_runs_of_a_study(home: Path, forker: Forker) -> None:
    make_mine(forker)
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "160", "LINES": "50"}
        os.execv(Path(sys.executable).with_name("wandb"), ["wandb", "leet", "runs/mine/wandb"])
    shown, deadline = b"", time.monotonic() + 60
    try:
        while b"log_prob" not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([terminal], [], [], 1.0)[0]:
                shown += os.read(terminal, 2**16)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def test_what_runs_elsewhere_is_still_in_the_readme() -> None:
    assert {elsewhere(words) for block in BLOCKS for words in block} - {None} == set(ELSEWHERE)


def test_from_nanogpts_files_to_a_convergence_figure_in_six_commands(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(WALK) + len(["git clone", "make study", ". .venv/bin/activate"]) <= 6
    for words in WALK:
        run(words, monkeypatch)
    assert len(list(Path("runs/shakespeare").glob("*/summary.json"))) == 3
    assert Path("figures/shakespeare/settling.png").stat().st_size > 0


@pytest.mark.parametrize("target", re.findall(r"^    make ([\w-]+)", README, re.MULTILINE))
def test_a_target_is_in_the_makefile(target: str) -> None:
    assert f"\n{target}: " in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_an_environment_that_could_not_be_made_is_made_again(tmp_path: Path) -> None:
    python = tmp_path / "python-without-ensurepip"
    python.write_text(
        '#!/bin/sh\n[ "$1" != -m ] && exit  # the look at the version\n'
        f'"{sys.executable}" -m venv --without-pip .venv\n'
        'echo "ensurepip is not available" >&2\nexit 1\n'
    )
    python.chmod(0o755)
    make = ["make", "-f", str(ROOT / "Makefile"), ".venv/bin/pip", f"PYTHON={python}"]
    for _ in range(2):
        done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "ensurepip is not available" in done.stderr


def test_what_a_notebook_is_told_runs(forker: Forker) -> None:
    told = README.split("In a notebook")[1].split("| frame |")[0]
    words = [word for word in re.findall("`([^`]+)`", told) if "/" not in word or "=" in word]
    done = forker.run(["-c", "\n".join(words).replace("runs/mine", str(OLD))])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_an_example_in_python_runs(example: str, forker: Forker) -> None:
    done = forker.run(["-c", example], env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("settled" in line for line in lines)
