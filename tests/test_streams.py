"""Every command of the project on any terminal, and on one that is closed, full or gone."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import Forker

ROOT = Path(__file__).parents[1]
OLD = ROOT / "tests" / "fixtures" / "ca8ee83" / "old"
FIXED = "32c8582498"  # a finished run

# words that print much in little time; HERE is a folder of the test's, MODEL a tiny one of bytes
RUN = "model=checkpoint model.path=MODEL device=cpu tracking.mode=disabled prompts.limit=1"
RUN += " prompts.max_tokens=6 recompute.iterations=2 runs_dir=HERE/runs"
TRAIN = "corpus.train=HERE corpus.held_out=HERE output=HERE/out tokenizer=byte device=cpu"
TRAIN += " architecture.vocab_size=257 architecture.n_layer=1 architecture.n_embd=12"
TRAIN += " architecture.block_size=8 training.steps=1 training.batch_size=1 tracking.mode=disabled"
COMMANDS = {
    "generate": "stateful_gpt.generate --model MODEL --prompt é☃ --max_new_tokens 2",
    "converge": f"experiments.converge {RUN}",
    "sweep": f"experiments.converge -m {RUN} feedback.strength=0.5,1",
    "train": f"experiments.train {TRAIN}",
    "state_tracking": "experiments.state_tracking --dry-run",
    "status": "experiments.status HERE/old",
    "verify": f"experiments.verify HERE/old --run {FIXED}",
    "table": "analysis table HERE/old",
    "figures": "analysis figures HERE/old --out HERE/figures",
    "page": "analysis page HERE/old --out HERE/page.html",
    "print_passes": "scripts.print_passes HERE/old --prompt prose",
    "held_out_loss": "scripts.held_out_loss --model MODEL --texts HERE",
    "sync_wandb": "scripts.sync_wandb --help",
    "make_dashboard": "scripts.make_dashboard --help",
    "prepare_corpus": "scripts.prepare_corpus --help",
    "prepare_names": "scripts.prepare_names --help",
    "prepare_smollm2": "scripts.prepare_smollm2 --help",
    "benchmark": "scripts.benchmark --help",
}
# those that share no code with the others, which are slow; some as forks, slow to start afresh
FRESH = ("generate", "status", "prepare_corpus")
FORKED = ("sweep", "verify", "table")
NAMES = [pytest.param(name, marks=[] if name in FRESH else [pytest.mark.slow]) for name in COMMANDS]
# redirections, and the exit code that tells the truth about what was printed
STREAMS = {
    ">/dev/full": 1,
    ">&- 2>/dev/full": 1,
    "2>&- | head -c 1 >/dev/null": 0,
}
# the same in a process that has begun: what Python finds at its start, and a reader that has left
AS_FOUND = {
    ">/dev/full": "full(1)",
    ">&- 2>/dev/full": "closed(1); full(2)",
    "2>&- | head -c 1 >/dev/null": "closed(2); left(1)",
}
REDIRECTED = """
import os, runpy, sys

def full(number):
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)

def closed(number):
    os.close(number)
    setattr(sys, {1: "stdout", 2: "stderr"}[number], None)

def left(number):
    reader, writer = os.pipe()
    os.dup2(writer, number)
    os.close(writer)
    os.close(reader)

STREAMS
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def words(checkpoint_folder: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The module of a command and what it is told."""
    shutil.copytree(OLD, tmp_path / "old")
    (tmp_path / "text.txt").write_text("the dog ran home " * 5)

    def found(name: str) -> list[str]:
        return [
            word.replace("HERE", str(tmp_path)).replace("MODEL", str(checkpoint_folder))
            for word in COMMANDS[name].split()
        ]

    return found


def call(
    words: list[str], streams: str = "", **environment: str
) -> "subprocess.CompletedProcess[bytes]":
    line = shlex.join([sys.executable, "-m", *words])
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{line} {streams}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_no_command_is_forgotten() -> None:
    modules = {line.split()[0] for line in COMMANDS.values()}
    scripts = {f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("[!_]*.py")}
    folders = {
        f"{p.parent.relative_to(ROOT)}".replace("/", ".") for p in ROOT.glob("e*/*/__main__.py")
    }
    assert scripts | folders | {"analysis", "scripts.benchmark"} <= modules


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("name", NAMES)
def test_streams_that_take_nothing_break_nothing(
    words: Callable[[str], list[str]], name: str, streams: str
) -> None:
    done = call(words(name), streams)
    expected = STREAMS[streams]
    if name == "status":  # a run of the study was killed
        expected = 1
    assert done.returncode == expected, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("name", FORKED)
def test_streams_that_take_nothing_break_nothing_in_a_fork(
    words: Callable[[str], list[str]], name: str, streams: str, forker: Forker
) -> None:
    program = REDIRECTED.replace("STREAMS", AS_FOUND[streams])
    done = forker.run(["-c", program, *words(name)])
    assert done.returncode == STREAMS[streams], done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_of_any_encoding_takes_what_is_printed(
    words: Callable[[str], list[str]], name: str, encoding: str
) -> None:
    done = call(words(name), PYTHONIOENCODING=encoding)
    assert done.returncode == (name == "status"), done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout.decode(encoding)


@pytest.mark.parametrize("name", FORKED)
def test_a_terminal_of_any_encoding_takes_what_a_fork_prints(
    words: Callable[[str], list[str]], name: str, forker: Forker
) -> None:
    program = REDIRECTED.replace("STREAMS", 'sys.stdout.reconfigure(encoding="ascii")')
    done = forker.run(
        ["-c", program, *words(name)], env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.isascii()
    assert done.stdout
