"""A settled text that goes on by steps is the text that passes would have made, in float64."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt import continuing, decoding
from stateful_gpt.decoding import Decoder
from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import Generation, Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.recompute import Outcome, RecomputeConfig
from stateful_gpt.solving import Drawn, Sampling
from stateful_gpt.windowed import Windowed, _WindowedPasses
from tests.stateful_gpt.test_decoding import EXACT
from tests.stateful_gpt.test_decoding import FEEDBACKS as DECODED

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
FEEDBACKS = [*DECODED, Feedback(FeedbackKind.PROB, 0.5), Feedback(hidden_strength=0.5)]
# the device's code runs on the CPU, too; what stands for a recording runs the step itself
WAYS = ["host", "device", "recorded"]


@dataclass
class Made:
    """One generation, what its listener was told, how many tokens each continuation drew, and the
    random numbers that are left.
    """

    result: Generation
    told: list[tuple[int, int]]
    counts: list[int]
    state: Tensor


class Replayed:
    """What recording leaves behind: another text in every place that steps write to."""

    def __init__(self, decoder: Decoder, part: str, keys: int) -> None:
        self.decoder, self.part, self.keys = weakref.proxy(decoder), part, keys
        decoder._begin(torch.zeros(1, dtype=torch.long))
        for _ in range(decoding.WARM_UPS):
            decoder._run(part, keys)

    def replay(self) -> None:
        self.decoder._run(self.part, self.keys)


def made(way: str, model: GPT, prompts: list[list[int]], *, seed: int, **options: Any) -> Made:
    """Texts continued token by token with a pass for each (``passes``), or one of the WAYS."""
    told: list[tuple[int, int]] = []
    counts: list[int] = []
    ahead = _WindowedPasses.draw_ahead

    def counted(maker: _WindowedPasses, *given: Any) -> Drawn | None:
        drawn = None if way == "passes" else ahead(maker, *given)
        counts.extend([] if drawn is None else [len(drawn.tokens)])
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_WindowedPasses, "draw_ahead", counted)
        patch.setattr(continuing, "DECODES_ON", ("cpu",) if way in WAYS[1:] else ())
        patch.setattr(decoding, "BUCKET", 16)
        if way == "recorded":
            patch.setattr(Decoder, "recorded", property(lambda _: True, lambda *_: None), False)
            patch.setattr(Decoder, "_record", lambda *given: Replayed(*given))
        generator = torch.Generator().manual_seed(seed)
        result = generate(
            model,
            prompts,
            solver=Windowed(),
            start=Start.CARRIED,
            generator=generator,
            on_token=lambda row, token: told.append((row, token)),
            **options,
        )
    return Made(result, told, counts, generator.get_state())


def assert_same(ours: Made, theirs: Made) -> None:
    assert ours.told == theirs.told
    assert torch.equal(ours.state, theirs.state)
    a, b = ours.result, theirs.result
    assert (a.tokens, a.outcomes, a.ended) == (b.tokens, b.outcomes, b.ended)
    for said, expected in zip(a.log_probs + a.estimates, b.log_probs + b.estimates, strict=True):
        assert said.shape == expected.shape
        same = (said - expected).abs() <= EXACT
        assert (same | (said.isnan() & expected.isnan())).all()


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=2),
    new=st.integers(0, 50),
    feedback=st.sampled_from(FEEDBACKS),
    way=st.sampled_from(WAYS),
    temperature=st.sampled_from([None, 0.9]),
    iterations=st.integers(1, 12),
    tolerance=st.sampled_from([0.0, 1e-12, 0.3]),
    end=st.booleans(),
)
def test_a_continued_text_is_that_of_passes_token_by_token(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    lengths: list[int],
    new: int,
    feedback: Feedback,
    way: str,
    temperature: float | None,
    iterations: int,
    tolerance: float,
    end: bool,
) -> None:
    """Also past the block, up to an end token, where the prompt settles late, roughly or never, and
    once one text of two has ended.
    """
    options = {
        "max_new_tokens": new,
        "feedback": feedback,
        "config": RecomputeConfig(iterations=iterations, tolerance=tolerance),
        "sampling": Sampling(
            temperature=temperature, top_k=5, vocab_size=11, end_token=3 if end else None
        ),
        "seed": seed,
    }
    model = make_gpt(seed, n_layer=3, block_size=40, hidden_feedback=feedback.of_hidden)
    prompts = [make_tokens(seed + i, 1, n)[0].tolist() for i, n in enumerate(lengths)]
    theirs = made("passes", model, prompts, **options)
    ours = made(way, model, prompts, **options)
    assert_same(ours, theirs)
    covered = not feedback.of_hidden and (way == "host" or feedback.kind is not FeedbackKind.PROB)
    settled = theirs.result.outcomes[0][0] in (Outcome.SETTLED, Outcome.WITHIN_TOLERANCE)
    if covered and len(lengths) == 1 and settled and new and iterations > 2:
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
    theirs, ours = (made(each, model, [prompt], **options) for each in ("passes", way))
    assert theirs.result.outcomes[0][-1] is Outcome.DIVERGED
    assert_same(ours, theirs)
    assert ours.counts[0] == (22 if way == "host" else decoding.STRIDE)  # up to position 27
