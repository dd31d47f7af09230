"""The benchmarks measure what they say, and their peers compute the same."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import scripts.benchmark.cuda as cuda
from scripts.benchmark import load, naive
from scripts.benchmark.__main__ import hardware, main
from scripts.benchmark.generation import as_transformers
from scripts.benchmark.rows import row
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import generate
from stateful_gpt.model import GPT
from stateful_gpt.recompute import RecomputeConfig
from tests.forked import Forker

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


def test_the_gpu_benchmark_runs_on_a_cpu_at_a_small_size(
    make_gpt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_gpt(3, block_size=32, dtype=torch.float32)
    small = (model, [[1, 2, 3, 4] * 4] * 2, 0.0)
    monkeypatch.setattr(cuda, "checked", lambda *, quick: small)
    rows = [row for measure in cuda.ROWS.values() for row in measure(quick=True)]
    assert [(found.key,) for found in rows] == list(cuda.ROWS)
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
def test_without_cuda_it_says_so_in_one_sentence(forker: Forker) -> None:
    done = forker.run(["-m", "scripts.benchmark", "cuda"])
    assert done.returncode == 1
    assert done.stderr == "benchmark cuda needs a CUDA device, and PyTorch finds none here\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_gpu_is_named_where_there_is_one() -> None:
    assert hardware()["gpu"] == torch.cuda.get_device_name()


def test_a_row_says_whether_it_is_met() -> None:
    assert row("x", [1.0, 3.0, 2.0], target=">= 2", note="").met
    assert not row("x", [1.0, 3.0, 2.0], target="<= 1.5", note="").met
    assert row("x", [1.0], note="").met, "where nothing is asked"


def test_only_the_rows_asked_for_are_measured_and_the_last_line_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # one of load's is called rows, too
    found = [row("a", [2.0], note="x"), row("rows", [3.0], note="")]
    measures = {("a", "b"): lambda quick: found, ("c",): lambda quick: 1 / 0}
    monkeypatch.setattr("scripts.benchmark.generation.ROWS", measures)
    monkeypatch.setattr(sys, "argv", ["x", "generation", "--json", "--quick", "--only", "b"])
    assert main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["a"], found["quick"], found["rows"][0]["note"]) == (2.0, True, "x")


def test_a_row_that_is_not_there_is_refused_by_naming_those_that_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "generation", "--only", "nonsense"])
    assert main() == 2
    out, err = capsys.readouterr()
    said = "--only: generation has generate_bundled, generate_gpt2, not nonsense"
    assert (out, err.splitlines()[-1]) == ("", f"python -m scripts.benchmark: error: {said}")


def test_without_transformers_the_benchmark_of_generation_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["x", "generation", "--quick"])
    assert main() == 1
    said = "the benchmark of generation needs transformers: pip install"
    assert capsys.readouterr().err == f"benchmark: {said} -e '.[hugging_face]' -c constraints.txt\n"


def test_every_row_of_every_saved_run_is_read_and_counted(tmp_path: Path) -> None:
    load.write_runs(tmp_path, runs=3, iterations=2)
    found = load.measure(tmp_path)
    assert (found["runs"], found["rows"]) == (3, 3 * 2 * 4 * 125)
    assert 0 < found["frames_seconds"] + found["trajectories_seconds"] <= found["seconds"] * 1.001
    assert found["peak_bytes"] > 2**20
