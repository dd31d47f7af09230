"""What ``import stateful_gpt`` gives."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

import stateful_gpt
from stateful_gpt.feedback import Feedback
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import Outcome

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]


def test_every_name_is_the_thing_itself_whatever_was_imported_before() -> None:
    program = (
        "import stateful_gpt as s, sys\n"
        "assert 'torch' not in sys.modules\n"
        "import stateful_gpt.recompute, stateful_gpt.trajectory, stateful_gpt.generate\n"
        "from stateful_gpt import generate, recompute, trajectory, load_checkpoint\n"
        "assert all(hasattr(s, name) for name in s.__all__), s.__all__\n"
        "print(callable(generate), callable(recompute), callable(trajectory), s.Feedback.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True True True Feedback\n", done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        stateful_gpt.nonsense  # noqa: B018


def test_a_trajectory_walks_from_the_plain_model_to_the_fixed_point(
    make_gpt: Make, make_tokens: Tokens
) -> None:
    model, tokens = make_gpt(1), make_tokens(2, 3, 9)
    found = stateful_gpt.trajectory(model, tokens, Feedback(strength=0.5), iterations=8)
    plain = stateful_gpt.trajectory(model, tokens[1].tolist(), Feedback(strength=0.0), iterations=1)
    assert found.log_probs.shape == (8, 3, 9)
    assert (found.log_probs[0, 1] - plain.log_probs[0, 0]).abs().max() <= 1e-12
    # 8 passes reach the oracle of 9 tokens, to rounding of float64
    exact = left_to_right(model, tokens, Feedback(strength=0.5))
    assert (found.log_probs[-1] - exact).abs().max() <= 1e-9
    assert (found.log_probs[0] - exact).abs().max() > 1e-3
    assert found.outcomes == [Outcome.SETTLED] * 3


def test_texts_that_come_within_a_tolerance_keep_their_estimates(
    make_gpt: Make, make_tokens: Tokens
) -> None:
    model, tokens, feedback = make_gpt(1), make_tokens(2, 8, 9), Feedback(strength=1.0)
    every = stateful_gpt.trajectory(model, tokens, feedback, iterations=8)
    found = stateful_gpt.trajectory(model, tokens, feedback, iterations=8, tolerance=1e-3)
    ends = []  # the first pass by which nothing of a text moves further
    for row in range(8):
        steps = every.log_probs[1:, row].sub(every.log_probs[:-1, row]).abs().amax(dim=1)
        ends.append(1 + int((steps <= 1e-3).nonzero()[0]))
    assert len(set(ends)) > 1, "they were to end at passes of their own"
    assert len(found.log_probs) == max(ends) + 1
    for row, end in enumerate(ends):
        for number, log_probs in enumerate(found.log_probs[:, row]):
            assert (log_probs - every.log_probs[min(number, end), row]).abs().max() <= 1e-12
    assert found.outcomes == [Outcome.WITHIN_TOLERANCE] * 8


@pytest.mark.parametrize(
    "tokens", [torch.zeros(0), torch.zeros(2, 0), torch.zeros(1, 1, 1), [1.5, 2.5]]
)
def test_a_text_without_tokens_has_no_trajectory(make_gpt: Make, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="tokens must be"):
        stateful_gpt.trajectory(make_gpt(1), tokens, Feedback())


def test_every_console_script_names_a_function() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    scripts = project["project"]["scripts"]
    assert sorted(scripts) == [
        f"stateful-gpt-{name}" for name in ("analysis", "converge", "generate", "status", "train")
    ]
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function))
