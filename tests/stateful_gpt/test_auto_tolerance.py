"""Stopping at rest, row by row, gives what all the passes over everything give.

Shapes: B batch, T tokens.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import Generation, Sampling, Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.oracle import LeftToRight, disturbed_reading, left_to_right
from stateful_gpt.passes import Passes
from stateful_gpt.recompute import Outcome, RecomputeConfig
from tests.recording import Recording

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]

# float64: matrices of another shape are summed in another order, and what moved by 16 roundings
# stays. Texts of 9 tokens at these strengths stretch such differences by less than 1e4.
EXACT = 1e-10

token_feedbacks = st.builds(
    Feedback,
    kind=st.sampled_from(list(FeedbackKind)),
    strength=st.floats(-0.3, 0.5),
    layers=st.none() | st.frozensets(st.integers(0, 1)),
    hidden_strength=st.sampled_from([0.0, 0.5]),
)
# of every position to itself: so weak that it settles
self_feedbacks = st.builds(
    Feedback,
    kind=st.sampled_from([FeedbackKind.NONE, FeedbackKind.LOG_PROB]),
    strength=st.just(0.1),
    hidden_strength=st.just(0.01),
    shift=st.just(0),
)


def generated(
    model: GPT,
    prompts: list[list[int]],
    feedback: Feedback,
    *,
    tolerance: float | str,
    damping: float,
    start: Start,
    seeds: list[int],
    temperature: float | None,
    watch: Recording | None = None,
) -> Generation:
    return generate(
        model,
        prompts,
        max_new_tokens=3 if damping == 1.0 else 1,
        feedback=feedback,
        # undamped, 8 positions and their output are final after 8 passes; damped, the distance
        # halves with every pass but for powers of their number
        config=RecomputeConfig(12 if damping == 1.0 else 110, tolerance, damping),
        start=start,
        sampling=Sampling(temperature=temperature),
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        watch=watch,
    )


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    feedback=token_feedbacks | self_feedbacks,
    damping=st.sampled_from([1.0, 1.0, 0.5]),
    start=st.sampled_from(list(Start)),
    temperature=st.sampled_from([None, 1.0]),
)
def test_it_runs_the_passes_of_the_definition_as_far_as_they_move_anything(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    lengths: list[int],
    feedback: Feedback,
    damping: float,
    start: Start,
    temperature: float | None,
) -> None:
    model = make_gpt(seed, block_size=8, hidden_feedback=True)
    prompts = [make_tokens(seed + i, 1, n)[0].tolist() for i, n in enumerate(lengths)]
    damping = damping if feedback.triangular else 1.0
    ours, theirs = Recording(model), Recording(model)
    options = {"damping": damping, "start": start, "temperature": temperature}
    seeds = [seed + i for i in range(len(prompts))]
    if not feedback.triangular:
        options["damping"] = 0.999  # of any other than 1 the theorem says nothing either
    auto, full = (
        generated(
            model, prompts, feedback, tolerance=tolerance, seeds=seeds, watch=watch, **options
        )
        for tolerance, watch in (("auto", ours), (0, theirs))
    )
    assert auto.tokens == full.tokens
    assert {outcome for outcomes in auto.outcomes for outcome in outcomes} == {Outcome.SETTLED}
    for a, b in zip(auto.log_probs + auto.estimates, full.log_probs + full.estimates, strict=True):
        assert (a - b).abs().max() <= EXACT
    assert len(ours.windows) == len(theirs.windows) == max(map(len, auto.outcomes))
    for window, some, every in zip(ours.windows, ours.passes, theirs.passes, strict=True):
        assert len(some) <= len(every)
        for mine, other in zip(some, every[: len(some)], strict=True):
            assert mine.number == other.number
            for i, row in enumerate(mine.span.rows):
                place = slice(window.lengths[row])
                step = mine.log_probs[i, place] - other.log_probs[row, place]
                assert step.abs().max() <= EXACT
        for row, length in enumerate(window.lengths):
            # the last pass that this row took part in, and all that it did not
            last = max(one.number for one in some if row in one.span.rows)
            for before, after in pairwise(every[last - 1 :]):
                step = after.log_probs[row, :length] - before.log_probs[row, :length]
                assert step.abs().max() <= EXACT
            if window is not ours.windows[-1]:  # a token is drawn from its last output
                ends = [passes[-1].hidden[row, length - 1] for passes in (some, every)]
                assert torch.allclose(*ends, rtol=0, atol=EXACT)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    feedback=token_feedbacks,
    start=st.sampled_from(list(Start)),
    temperature=st.sampled_from([None, 1.0]),
)
def test_every_row_is_its_text_alone_whoever_leaves_and_whoever_draws(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    lengths: list[int],
    feedback: Feedback,
    start: Start,
    temperature: float | None,
) -> None:
    model = make_gpt(seed, block_size=8, hidden_feedback=True)
    prompts = [make_tokens(seed + i, 1, n)[0].tolist() for i, n in enumerate(lengths)]
    seen = Recording(model)
    options = {"tolerance": "auto", "damping": 1.0, "start": start, "temperature": temperature}
    seeds = [seed + i for i in range(len(prompts))]
    together = generated(model, prompts, feedback, seeds=seeds, watch=seen, **options)
    for row, prompt in enumerate(prompts):
        alone = generated(model, [prompt], feedback, seeds=seeds[row : row + 1], **options)
        assert together.tokens[row] == alone.tokens[0]
        assert together.outcomes[row] == alone.outcomes[0]
        for ours, theirs in (
            (together.log_probs[row], alone.log_probs[0]),
            (together.estimates[row], alone.estimates[0]),
        ):
            assert (ours - theirs).abs().max() <= EXACT


@pytest.mark.parametrize("start", list(Start))
def test_rows_that_have_ended_leave_the_batch(
    make_gpt: Make, make_tokens: Tokens, start: Start
) -> None:
    model, seen = make_gpt(3), Recording(make_gpt(3))
    texts = [make_tokens(n, 1, n)[0].tolist() for n in (3, 12, 6)]
    generate(
        model,
        texts,
        max_new_tokens=0,
        feedback=Feedback(strength=0.5),
        config=RecomputeConfig(),
        start=start,
        watch=seen,
    )
    rows = [one.span.rows for one in seen.passes[0]]
    assert rows[0] == [0, 1, 2]
    assert rows[-1] == [1]
    assert [0] not in rows
    assert [1, 2] in rows
    begins = [one.span.begin for one in seen.passes[0]]
    assert begins == list(range(11)), "what is final is not read again"


def test_nothing_is_sized_by_what_a_model_could_read(
    make_gpt: Make, make_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_gpt(1, block_size=4096, hidden_feedback=True)
    tokens, feedback = make_tokens(2, 2, 64), Feedback(strength=0.1, hidden_strength=0.1)
    capacities: list[int] = []
    new_cache = model.new_cache

    def counting(*, batch: int, capacity: int) -> object:
        capacities.append(capacity)
        return new_cache(batch=batch, capacity=capacity)

    monkeypatch.setattr(model, "new_cache", counting)
    passes = Passes(model, feedback, batch=2, capacity=64, cached=True)
    assert passes.hidden.shape == (2, 64, 16)
    left_to_right(model, tokens, feedback)
    LeftToRight(model, feedback, batch=2, capacity=64)
    disturbed_reading(model, tokens, feedback, lengths=[64, 64])
    result = generate(
        model,
        tokens[:, :60].tolist(),
        max_new_tokens=4,
        feedback=feedback,
        config=RecomputeConfig(iterations=3),
        start=Start.CARRIED,
    )
    assert [len(text) for text in result.tokens] == [64, 64]
    assert capacities == [64] * 5
