"""A settled text that goes on by steps is the text that passes would have made, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt import continuing, decoding
from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import Generation, Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.recompute import Outcome, RecomputeConfig
from stateful_gpt.solving import Drawn, Sampling
from stateful_gpt.windowed import Windowed, _WindowedPasses

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
EXACT = 1e-10  # nats, float64
FEEDBACKS = [
    Feedback(strength=0.6),
    Feedback(strength=-0.4, layers=(1,)),
    Feedback(FeedbackKind.LOGIT, 0.3),
    Feedback(FeedbackKind.NONE),
    Feedback(FeedbackKind.PROB, 0.5),
    Feedback(hidden_strength=0.5),
]
WAYS = ["host", "device"]  # the device's code runs on the CPU, too, but for the recording


@dataclass
class Made:
    """One generation, what its listener was told, and how many tokens each continuation drew."""

    result: Generation
    told: list[int]
    counts: list[int]


def made(way: str, model: GPT, prompt: list[int], *, seed: int | None, **options: Any) -> Made:
    """A text continued token by token with a pass for each (``passes``), or one of the WAYS."""
    told: list[int] = []
    counts: list[int] = []
    ahead = _WindowedPasses.draw_ahead

    def counted(maker: _WindowedPasses, *given: Any) -> Drawn | None:
        drawn = None if way == "passes" else ahead(maker, *given)
        counts.extend([] if drawn is None else [len(drawn.tokens)])
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_WindowedPasses, "draw_ahead", counted)
        patch.setattr(continuing, "DECODES_ON", ("cpu",) if way == "device" else ())
        patch.setattr(decoding, "BUCKET", 16)
        result = generate(
            model,
            [prompt],
            solver=Windowed(),
            start=Start.CARRIED,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
            on_token=lambda row, token: told.append(token),
            **options,
        )
    return Made(result, told, counts)


def assert_same(ours: Made, theirs: Made) -> None:
    assert ours.told == theirs.told
    a, b = ours.result, theirs.result
    assert (a.tokens, a.outcomes, a.ended) == (b.tokens, b.outcomes, b.ended)
    for said, expected in ((a.log_probs, b.log_probs), (a.estimates, b.estimates)):
        assert said[0].shape == expected[0].shape
        same = (said[0] - expected[0]).abs() <= EXACT
        assert (same | (said[0].isnan() & expected[0].isnan())).all()


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 10),
    new=st.integers(0, 50),
    feedback=st.sampled_from(FEEDBACKS),
    way=st.sampled_from(WAYS),
    temperature=st.sampled_from([None, 0.9]),
    iterations=st.integers(1, 12),
    tolerance=st.sampled_from([0.0, 1e-12]),
    end=st.booleans(),
)
def test_a_continued_text_is_that_of_passes_token_by_token(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    length: int,
    new: int,
    feedback: Feedback,
    way: str,
    temperature: float | None,
    iterations: int,
    tolerance: float,
    end: bool,
) -> None:
    """Also past the block, up to an end token, and where the prompt settles late or never."""
    options = {
        "max_new_tokens": new,
        "feedback": feedback,
        "config": RecomputeConfig(iterations=iterations, tolerance=tolerance),
        "sampling": Sampling(
            temperature=temperature, top_k=5, vocab_size=11, end_token=3 if end else None
        ),
        "seed": seed if temperature is not None else None,
    }
    model = make_gpt(seed, n_layer=3, block_size=40, hidden_feedback=feedback.of_hidden)
    prompt = make_tokens(seed, 1, length)[0].tolist()
    theirs = made("passes", model, prompt, **options)
    ours = made(way, model, prompt, **options)
    assert_same(ours, theirs)
    covered = not feedback.of_hidden and (way == "host" or feedback.kind is not FeedbackKind.PROB)
    if covered and theirs.result.outcomes[0][0] is Outcome.SETTLED and new and iterations > 2:
        assert ours.counts, "it was continued"
    elif not covered:
        assert not ours.counts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [None, 0.9])
def test_a_text_that_diverges_is_left_to_the_passes(
    make_gpt: Make, make_tokens: Tokens, way: str, temperature: float | None
) -> None:
    model = make_gpt(7, block_size=60)
    with torch.no_grad():
        model.transformer.wpe.weight[27] = torch.nan  # reached in the second stride
    prompt = make_tokens(1, 1, 6)[0].tolist()
    options = {
        "max_new_tokens": 40,
        "feedback": Feedback(strength=0.5),
        "config": RecomputeConfig(iterations=64),
        "sampling": Sampling(temperature=temperature),
        "seed": 1,
    }
    theirs, ours = (made(each, model, prompt, **options) for each in ("passes", way))
    assert theirs.result.outcomes[0][-1] is Outcome.DIVERGED
    assert_same(ours, theirs)
    assert ours.counts[0] == (decoding.STRIDE if way == "device" else 22)  # up to position 27
