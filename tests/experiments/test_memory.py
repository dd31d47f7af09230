"""Memory that comes to an end, for real: one sentence with the setting that helps."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stateful_gpt.checkpoint import save_checkpoint
from stateful_gpt.model import GPT, GPTConfig
from tests.forked import Forker

Limited = Callable[..., tuple[int, str]]
# a process that has imported all it needs may take this many bytes more
LIMITED = """
import resource, sys
from importlib import import_module
import torch, stateful_gpt.checkpoint, stateful_gpt.generate, experiments.converge.run
import experiments.train.run, experiments.state_tracking.run
more, module, *words = sys.argv[1:]
main = import_module(module).main
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(more),) * 2)
sys.argv = [module, *words]
raise SystemExit(main())
"""


@pytest.fixture
def limited(forker: Forker) -> Limited:
    """Exit code and standard error of a command that may take so many bytes more than imports."""

    def call(more: int, module: str, *words: str, first: str = "") -> tuple[int, str]:
        done = forker.run(["-c", f"{first}\n{LIMITED}", str(more), module, *words])
        return done.returncode, done.stderr

    return call


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 200 MB, whose weights are all 0."""
    folder = tmp_path_factory.mktemp("large") / "large"
    config = GPTConfig(block_size=8, vocab_size=50_000, n_layer=1, n_head=2, n_embd=800)
    with torch.device("meta"):  # drawing initial weights takes seconds
        model = GPT(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    save_checkpoint(model, folder, tokenizer="byte")
    return folder


@pytest.fixture(scope="module")
def long(make_gpt: Callable[..., GPT], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads texts for which memory runs out."""
    folder = tmp_path_factory.mktemp("long") / "long"
    model = make_gpt(1, block_size=16_384, vocab_size=257, dtype=torch.float32)
    save_checkpoint(model, folder, tokenizer="byte")
    return folder


MEGABYTE = 2**20


def converge(model: Path, place: Path, *more: str) -> list[str]:
    return [
        *("model=checkpoint", f"model.path={model}", "device=cpu", "tracking.mode=disabled"),
        *(f"runs_dir={place / 'runs'}", "prompts.limit=1", "study=s", *more),
    ]


def text(place: Path, characters: int) -> Path:
    (place / "long.txt").write_text("a" * characters)
    return place / "long.txt"


def said_once(err: str) -> str:
    assert "Traceback" not in err
    assert "frame #" not in err
    assert "enforce fail" not in err
    lines = [line for line in err.splitlines() if "memory does not hold" in line]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
def test_a_model_that_memory_does_not_hold_is_one_sentence(
    limited: Limited, large: Path, tmp_path: Path, sweep: list[str]
) -> None:
    code, err = limited(
        150 * MEGABYTE, "experiments.converge.__main__", *sweep, *converge(large, tmp_path)
    )
    assert code == 1, err
    assert "does not hold the model: use a smaller one, or device.dtype=" in said_once(err)


def test_a_copy_that_memory_does_not_hold_names_what_helps(
    limited: Limited, large: Path, tmp_path: Path
) -> None:
    words = converge(large, tmp_path, "prompts.max_tokens=2")
    small = "import stateful_gpt.untrusted as m; m.machine_memory = lambda: 360_000_000"
    code, err = limited(2000 * MEGABYTE, "experiments.converge.__main__", *words, first=small)
    assert code == 1, err
    assert said_once(err).endswith(", or measures.lyapunov=false")


def test_a_model_that_memory_does_not_hold_writes_no_text(limited: Limited, large: Path) -> None:
    words = ("--model", str(large), "--prompt", "x", "--device", "cpu")
    code, err = limited(150 * MEGABYTE, "stateful_gpt.cli", *words)
    assert code == 1, err
    assert "the machine's memory does not hold the model and its text" in said_once(err)


def test_a_run_that_memory_does_not_hold_names_what_helps(
    limited: Limited, long: Path, tmp_path: Path
) -> None:
    at_once = "measures.oracle=false"  # which reads token by token, in little memory and much time
    words = converge(long, tmp_path, f"prompts.file={text(tmp_path, 16_000)}", at_once)
    code, err = limited(150 * MEGABYTE, "experiments.converge.__main__", *words)
    assert code == 1, err
    assert "does not hold the run: use a smaller prompts.max_tokens or" in said_once(err)
    (folder,) = (tmp_path / "runs" / "s").iterdir()
    assert '"state": "failed"' in (folder / "status.json").read_text()


def test_a_training_that_memory_does_not_hold_names_what_helps(
    limited: Limited, tmp_path: Path
) -> None:
    for side in ("train", "held_out"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.txt").write_text("the dog ran home " * 50)
    words = [
        *(f"corpus.{side}={tmp_path / side}" for side in ("train", "held_out")),
        *(f"output={tmp_path / 'out'}", "tokenizer=byte", "architecture.vocab_size=257"),
        *("architecture.n_layer=1", "architecture.n_embd=12", "architecture.block_size=64"),
        *("training.batch_size=10000", "training.steps=1", "device=cpu", "tracking.mode=disabled"),
    ]
    code, err = limited(150 * MEGABYTE, "experiments.train.__main__", *words)
    assert code == 1, err
    said = "use a smaller training.batch_size or architecture.block_size"
    assert said_once(err).endswith(said)
    words += ["architecture.n_layer=1000000000"]
    code, err = limited(150 * MEGABYTE, "experiments.train.__main__", *words)
    assert code == 2, err
    assert re.fullmatch(r"error: architecture.n_layer .* 27,\d+,\d+,\d+,\d+ bytes .*\n", err), err
