"""The benchmarks measure what they say, and their peers compute the same."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import scripts.benchmark.cuda as cuda
from scripts.benchmark import naive
from scripts.benchmark.generation import as_transformers
from scripts.benchmark.rows import row
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import generate
from stateful_gpt.model import GPT
from stateful_gpt.recompute import RecomputeConfig

Make = Callable[..., GPT]


def test_the_naive_loop_ends_where_the_study_does(make_gpt: Make) -> None:
    model = make_gpt(3, dtype=torch.float32)
    texts = [[1, 5, 9, 2, 7, 3, 3, 8], [4, 4, 2, 9, 1, 0, 6, 5]]
    result = generate(
        model,
        texts,
        max_new_tokens=0,
        feedback=Feedback(strength=0.5),
        config=RecomputeConfig(iterations=7),
    )
    with torch.no_grad():
        ends = naive.study(model, texts, 0.5)
    for end, log_probs in zip(ends, result.log_probs, strict=True):
        # float32, logits of order 10, eight tokens
        assert end == pytest.approx(log_probs[1:].mean().item(), abs=1e-4)


def test_the_peer_of_generation_has_the_same_weights(make_gpt: Make) -> None:
    model = make_gpt(3, activation="gelu_tanh")
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        theirs = as_transformers(model).double()(tokens).logits
        ours = model.logits(model.read(tokens))
    assert (theirs - ours).abs().max() <= 1e-10  # float64 through two layers


def test_the_gpu_benchmark_runs_on_a_cpu_at_a_small_size(make_gpt: Make) -> None:
    model = make_gpt(3, block_size=32, dtype=torch.float32)
    size = cuda.Size(texts=2, tokens=16, alone=1, repeats=1)
    rows = list(cuda.rows(model, size, only=[]))
    assert [found.key for found in rows] == ["batch_vs_alone", "outside_kernels"]
    assert rows[0].value > 0
    assert 0 <= rows[1].value < 1


def test_a_wrong_number_ends_the_gpu_benchmark(
    make_gpt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cuda.left_to_right
    monkeypatch.setattr(cuda, "left_to_right", lambda *given: right(*given) - 2.0)
    with pytest.raises(ValueError, match="nats from the reference, allowed are"):
        cuda.check(make_gpt(3), torch.tensor([[1, 2, 3, 4]]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_cuda_it_says_so_in_one_sentence() -> None:
    words = [sys.executable, "-m", "scripts.benchmark", "cuda"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "benchmark cuda needs a CUDA device, and PyTorch finds none here\n"


def test_a_row_says_whether_it_is_met() -> None:
    assert row("x", [1.0, 3.0, 2.0], target=">= 2", note="").met
    assert not row("x", [1.0, 3.0, 2.0], target="<= 1.5", note="").met
