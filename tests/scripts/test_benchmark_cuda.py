"""The GPU benchmark: all that can run on a CPU, run there on a tiny model."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from scripts.benchmark.cuda import TINY, check, main, measure
from stateful_gpt.model import GPT


@pytest.fixture(scope="module")
def tiny(make_gpt: Callable[..., GPT]) -> GPT:
    return make_gpt(3, block_size=32, vocab_size=64, dtype=torch.float32)


def test_every_row_runs_and_is_checked_first(
    tiny: GPT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as on a bare machine
    checks, rows = measure(tiny, torch.device("cpu"), TINY)
    assert len(checks) == 6
    assert [row.key for row in rows] == [
        "mask_over_columns",
        "pass_gemm_fraction",
        "log_prob_chunk",
        "generate_bandwidth",
        "fixed_point_gpt2",
    ]
    assert all(row.value > 0 for row in rows)
    assert "transformers is not installed" in capsys.readouterr().err


def test_a_wrong_number_ends_it(tiny: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    import scripts.benchmark.cuda as benchmark

    right = benchmark.left_to_right
    monkeypatch.setattr(benchmark, "left_to_right", lambda *given: right(*given) - 2.0)
    with pytest.raises(ValueError, match="nats from the reference, allowed are"):
        check(tiny, torch.device("cpu"), 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_cuda_it_says_so_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_cuda"])
    assert main() == 1
    said = capsys.readouterr()
    assert said.err == "benchmark_cuda needs a CUDA device, and PyTorch finds none here\n"
    assert said.out == ""


def test_it_needs_nothing_but_torch_and_numpy() -> None:
    absent = ("hydra", "omegaconf", "wandb", "pandas", "tiktoken", "safetensors", "transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import scripts.benchmark.cuda"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
