"""A windowed recompute gives what the full recompute gives, and evaluates no more than it promises.

Tolerances: float64, where matrices of another shape are summed in another order. Differences of
1e-15 nats are amplified along a text, in these short ones by less than a factor of 1e5.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import Generation, Sampling, Start, Watcher, generate
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import Outcome, RecomputeConfig
from tests.recording import Recording

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]

EXACT = 1e-10  # nats, float64
KINDS = [FeedbackKind.LOG_PROB, FeedbackKind.LOGIT, FeedbackKind.PROB]
WINDOWS = st.sampled_from([1, 2, 5, "all", "auto"])
STRENGTHS = st.floats(-0.5, 1.0)


def study(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    feedback: Feedback,
    window: int | str | None,
    *,
    new: int = 0,
    iterations: int = 40,
    tolerance: float | str = 0,
    start: Start = Start.COLD,
    seen: Callable[..., Watcher] | None = None,
    sampling: Sampling | None = None,
) -> Generation:
    """By default, and without a window, every pass evaluates every position: the definition."""
    return generate(
        model,
        prompts,
        max_new_tokens=new,
        feedback=feedback,
        config=RecomputeConfig(iterations, tolerance, window=window),
        start=start,
        watch=seen,
        sampling=sampling,
    )


def assert_same(ours: Generation, theirs: Generation, *, within: float = EXACT) -> None:
    assert ours.tokens == theirs.tokens
    assert ours.outcomes == theirs.outcomes
    assert ours.ended == theirs.ended
    for a, b in zip(
        ours.log_probs + ours.estimates, theirs.log_probs + theirs.estimates, strict=True
    ):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= within


def evaluated(model: GPT, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions that each pass evaluates, as they come."""
    counts: list[int] = []
    read = model.read

    def counting(tokens: Tensor, **options: object) -> Tensor:
        counts.append(tokens.size(1))
        return read(tokens, **options)

    monkeypatch.setattr(model, "read", counting)
    return counts


# --- the same numbers ---------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    kind=st.sampled_from(KINDS),
    strength=STRENGTHS,
    layers=st.sampled_from([None, (0,), (1,), (0, 2)]),
    window=WINDOWS,
    start=st.sampled_from(list(Start)),
)
def test_the_fixed_point_is_that_of_the_full_recompute(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    lengths: list[int],
    kind: FeedbackKind,
    strength: float,
    layers: tuple[int, ...] | None,
    window: int | str,
    start: Start,
) -> None:
    model = make_gpt(seed, n_layer=3)
    texts = [make_tokens(seed + i, 1, n)[0].tolist() for i, n in enumerate(lengths)]
    feedback = Feedback(kind, strength, layers)
    full = study(model, texts, feedback, None, iterations=16, start=start)
    assert_same(study(model, texts, feedback, window, iterations=16, start=start), full)
    for text, log_probs in zip(texts, full.log_probs, strict=True):
        oracle = left_to_right(model, torch.tensor([text]), feedback)[0]
        assert (log_probs - oracle).abs().max() <= EXACT


@example(seed=1, length=12, kind=FeedbackKind.LOG_PROB, strength=0.125, iterations=10)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 14),
    kind=st.sampled_from(KINDS),
    strength=STRENGTHS,
    iterations=st.integers(1, 17),
)
@example(seed=0, length=3, kind=FeedbackKind.LOG_PROB, strength=0.0, iterations=1)
def test_reading_to_the_end_is_the_full_recompute_pass_by_pass(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    length: int,
    kind: FeedbackKind,
    strength: float,
    iterations: int,
) -> None:
    model, text = make_gpt(seed), make_tokens(seed + 1, 1, length).tolist()
    feedback = Feedback(kind, strength)
    ours, theirs = Recording(model), Recording(model)
    result = study(model, text, feedback, "all", iterations=iterations, seen=ours)
    full = study(model, text, feedback, None, iterations=iterations, seen=theirs)
    if result.outcomes != full.outcomes:
        # a last step within rounding is final to the one, to the other only a step of 0 is
        assert (result.outcomes, full.outcomes) == (
            [[Outcome.SETTLED]],
            [[Outcome.ITERATION_LIMIT]],
        )
        last = theirs.passes[0][-1]
        if feedback.active:  # else the first pass is known to be the last
            assert last.step_max is not None
            # 16 roundings of a logit of order 100 are 4e-13, and its logsumexp moves along
            assert last.step_max[0] <= 1e-11
        full = replace(full, outcomes=result.outcomes)
    assert_same(result, full)
    assert len(ours.passes[0]) == len(theirs.passes[0]) == iterations
    for mine, other in zip(ours.passes[0], theirs.passes[0], strict=True):
        assert mine.number == other.number
        for a, b in ((mine.log_probs, other.log_probs), (mine.hidden, other.hidden)):
            assert (a - b).abs().max() <= EXACT
        if other.step_max is None:
            assert mine.step_max is None
            continue
        assert mine.step_max is not None
        assert mine.step_rms is not None
        assert (mine.step_max - other.step_max).abs().max() <= EXACT
        assert (mine.step_rms - other.step_rms).abs().max() <= EXACT


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    kind=st.sampled_from(KINDS),
    strength=STRENGTHS,
    window=WINDOWS,
    start=st.sampled_from(list(Start)),
    ends=st.booleans(),
)
def test_generation_is_the_reference_before_and_after_the_window_slides(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    lengths: list[int],
    kind: FeedbackKind,
    strength: float,
    window: int | str,
    start: Start,
    ends: bool,
) -> None:
    model = make_gpt(seed, block_size=8)
    prompts = [make_tokens(seed + i, 1, n)[0].tolist() for i, n in enumerate(lengths)]
    feedback = Feedback(kind, strength)
    sampling = Sampling()
    if ends:  # an end that some row draws
        first = study(model, prompts[:1], feedback, None, new=3, start=start)
        sampling = Sampling(end_tokens=[first.tokens[0][-1]])
    options = {"new": 9, "iterations": 10, "start": start, "sampling": sampling}
    full = study(model, prompts, feedback, None, **options)
    ours = study(model, prompts, feedback, window, **options)
    assert_same(ours, full)


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    window=WINDOWS,
    start=st.sampled_from(list(Start)),
)
def test_one_pass_a_token_is_the_full_recompute_whatever_the_window(
    make_gpt: Make, make_tokens: Tokens, seed: int, length: int, window: int | str, start: Start
) -> None:
    # the last allowed pass reads to the end: nothing is drawn from what was not evaluated
    model, prompt = make_gpt(seed, block_size=8), make_tokens(seed + 1, 1, length).tolist()
    feedback = Feedback(strength=0.6)
    full = study(model, prompt, feedback, None, new=6, iterations=1, start=start)
    ours = study(model, prompt, feedback, window, new=6, iterations=1, start=start)
    assert_same(ours, full)


@given(seed=st.integers(0, 2**31), window=WINDOWS, tolerance=st.sampled_from([0, "auto", 1e-3]))
def test_rows_do_not_depend_on_their_mates(
    make_gpt: Make, make_tokens: Tokens, seed: int, window: int | str, tolerance: float | str
) -> None:
    model = make_gpt(seed)
    prompts = [make_tokens(seed + n, 1, n)[0].tolist() for n in (9, 2, 13)]
    options = {"new": 5, "iterations": 9, "tolerance": tolerance, "start": Start.CARRIED}
    together = study(model, prompts, Feedback(strength=0.4), window, **options)
    for row, prompt in enumerate(prompts):
        alone = study(model, [prompt], Feedback(strength=0.4), window, **options)
        assert together.tokens[row] == alone.tokens[0]
        assert together.outcomes[row] == alone.outcomes[0]
        assert (together.log_probs[row] - alone.log_probs[0]).abs().max() <= EXACT


@pytest.mark.parametrize("window", [1, 16, "all", "auto"])
@pytest.mark.parametrize("strength", [-0.1, 0.1, 0.3])
def test_in_float32_the_fixed_point_is_within_the_stated_bound(
    make_gpt: Make, make_tokens: Tokens, window: int | str, strength: float
) -> None:
    model, text = make_gpt(5, block_size=64), make_tokens(6, 1, 64)
    feedback = Feedback(strength=strength)
    exact = left_to_right(model, text, feedback)[0]
    result = study(model.float(), text.tolist(), feedback, window, iterations=64, tolerance=1e-5)
    # logits of up to 20 round by 1e-6; the response to that is of the order of 10
    assert (result.log_probs[0] - exact).abs().max() <= 1e-3


def test_with_nothing_fed_back_one_pass_is_the_plain_model(
    make_gpt: Make, make_tokens: Tokens
) -> None:
    model, text = make_gpt(5), make_tokens(6, 1, 12).tolist()
    for feedback in (Feedback(strength=0.0), Feedback(FeedbackKind.NONE)):
        plain = study(model, text, feedback, None)
        ours = study(model, text, feedback, "auto", iterations=1)
        assert torch.equal(ours.log_probs[0], plain.log_probs[0])  # bit for bit
        assert ours.outcomes == [[Outcome.SETTLED]]


# --- tolerance ----------------------------------------------------------------------------------


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), window=WINDOWS, tolerance=st.sampled_from([1e-9, 1e-6, 1e-4]))
def test_a_tolerance_settles_positions_near_where_they_end(
    make_gpt: Make, make_tokens: Tokens, seed: int, window: int | str, tolerance: float
) -> None:
    model, text = make_gpt(seed, block_size=32), make_tokens(seed + 1, 1, 32)
    feedback = Feedback(strength=0.02)
    result = study(model, text.tolist(), feedback, window, tolerance=tolerance)
    exact = left_to_right(model, text, feedback)[0]
    # contraction: what is left to move is a fraction of the last step, seen through the response
    assert (result.log_probs[0] - exact).abs().max() <= 10 * tolerance
    # 32 positions one at a time are settled by the theorem; wider windows end before it holds
    expected = Outcome.SETTLED if window == 1 else Outcome.WITHIN_TOLERANCE
    assert result.outcomes[0][0] in (expected, Outcome.SETTLED)


def test_a_tolerance_that_was_used_is_said_so(make_gpt: Make, make_tokens: Tokens) -> None:
    model, text = make_gpt(5, block_size=32), make_tokens(6, 1, 32).tolist()
    seen = Recording(model)
    result = study(
        model,
        text,
        Feedback(strength=0.05),
        "all",
        tolerance=1e-6,
        new=3,
        start=Start.CARRIED,
        seen=seen,
    )
    # also of the tokens drawn later: they rest on a prefix that is final within the tolerance
    assert result.outcomes == [[Outcome.WITHIN_TOLERANCE] * 4]
    assert len(seen.passes[0]) < 31
    assert [len(passes) for passes in seen.passes[1:]] != [31] * 3


@pytest.mark.parametrize(
    ("feedback", "said"),
    [
        (Feedback(FeedbackKind.LOGIT, 1e-3), None),
        (Feedback.of_kind("hidden_state", 0.1), None),
        (Feedback(strength=0.5), -5.0),  # what a caller may say of a text that the model expects
    ],
    ids=["logit", "hidden state", "previous"],
)
def test_a_tolerance_is_one_of_what_is_fed(
    make_gpt: Make, feedback: Feedback, said: float | None
) -> None:
    model, text = make_gpt(0, tied=False, hidden_feedback=True), [1]
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        for _ in range(11):  # log-probabilities near 0, those of a start: as if none had moved
            text.append(int(model.logits(model.read(torch.tensor([text]))[0, -1:]).argmax()))
    result = generate(
        model,
        [text],
        max_new_tokens=0,
        feedback=feedback,
        config=RecomputeConfig(tolerance=1e-3, window="all"),
        previous=None if said is None else [torch.full((12,), said, dtype=torch.float64)],
    )
    exact = left_to_right(model, torch.tensor([text]), feedback)[0]
    # contraction: what is left to move is a fraction of the tolerance
    assert (result.log_probs[0] - exact).abs().max() <= 1e-3


# --- no more than promised ----------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, "all", "auto"])
@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_one_new_token_costs_one_step_of_one_token(
    make_gpt: Make,
    make_tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    window: int | str,
    strength: float,
) -> None:
    model, prompt = make_gpt(3, block_size=32), make_tokens(4, 1, 6).tolist()
    feedback, seen = Feedback(strength=strength), Recording(model)
    counts = evaluated(model, monkeypatch)
    result = study(
        model,
        prompt,
        feedback,
        window,
        new=20,
        tolerance="auto",
        start=Start.CARRIED,
        seen=seen,
    )
    assert set(result.outcomes[0]) == {Outcome.SETTLED}
    assert [len(passes) for passes in seen.passes[1:]] == [1] * 20
    assert counts[-20:] == [1] * 20
    assert len(counts) == 20 + len(seen.passes[0])


@pytest.mark.parametrize("window", [1, 2, 7])
def test_a_pass_evaluates_no_more_than_its_window(
    make_gpt: Make, make_tokens: Tokens, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    model, text = make_gpt(3, block_size=32), make_tokens(4, 1, 30).tolist()
    counts = evaluated(model, monkeypatch)
    study(model, text, Feedback(strength=0.5), window, tolerance="auto")
    assert counts[0] == 30  # the plain model's estimates of the whole text
    assert all(count <= window for count in counts[1:])
    if window == 1:
        assert counts[1:] == [1] * 29


@pytest.mark.parametrize("window", [1, 3, "all", "auto"])
@pytest.mark.parametrize(("iterations", "tolerance"), [(3, "auto"), (40, "auto"), (40, 0.1)])
@pytest.mark.parametrize("start", Start)
def test_watching_changes_nothing(
    make_gpt: Make,
    make_tokens: Tokens,
    window: int | str,
    iterations: int,
    tolerance: float | str,
    start: Start,
) -> None:
    model, texts = (
        make_gpt(3),
        [make_tokens(seed, 1, T).tolist()[0] for seed, T in ((4, 9), (5, 2))],
    )

    def grown(seen: Recording | None) -> Generation:
        options = {"iterations": iterations, "tolerance": tolerance, "start": start}
        return study(model, texts, Feedback(), window, new=5, seen=seen, **options)

    assert_same(grown(None), grown(Recording(model)), within=0.0)


def test_passes_after_the_end_evaluate_nothing(
    make_gpt: Make, make_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = make_gpt(3), make_tokens(4, 1, 10).tolist()
    counts, seen = evaluated(model, monkeypatch), Recording(model)
    study(model, text, Feedback(strength=0.5), "all", iterations=25, seen=seen)
    assert len(seen.passes[0]) == 25
    assert len(counts) <= 10
    assert counts == sorted(counts, reverse=True)


def test_what_an_observer_was_shown_does_not_change(make_gpt: Make, make_tokens: Tokens) -> None:
    model, text = make_gpt(3), make_tokens(4, 1, 10).tolist()
    seen = Recording(model)
    study(model, text, Feedback(strength=0.5), 2, new=4, start=Start.CARRIED, seen=seen)
    shown = [one for passes in seen.passes for one in passes]
    assert len(shown) > 5
    assert all(torch.equal(one.shown, one.log_probs) for one in shown)


@pytest.mark.parametrize("window", [1, 2, 7, "all", "auto"])
def test_an_observer_sees_where_the_output_of_every_position_ends(
    make_gpt: Make, make_tokens: Tokens, window: int | str
) -> None:
    model, texts = (
        make_gpt(3),
        [make_tokens(seed, 1, T).tolist()[0] for seed, T in ((4, 12), (5, 2))],
    )
    ours, theirs = Recording(model), Recording(model)
    result = study(model, texts, Feedback(), window, tolerance="auto", seen=ours)
    study(model, texts, Feedback(), None, seen=theirs)
    ends, hidden = theirs.passes[0][-1].hidden, ours.passes[0][-1].hidden
    for row, text in enumerate(texts):
        assert (hidden[row, : len(text)] - ends[row, : len(text)]).abs().max() <= EXACT
    assert result.outcomes == [[Outcome.SETTLED]] * 2
    # it takes a pass more than the estimates, and no row needs that to be settled
    (enough,) = study(
        model, texts[:1], Feedback(), 1, iterations=11, seen=Recording(model)
    ).outcomes
    assert enough == [Outcome.SETTLED]


# --- refused, and gone wrong --------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, -1, True, 1.5, "some"])
def test_an_impossible_window_is_refused(window: object) -> None:
    with pytest.raises(ValueError, match="window must be all, auto or a whole number"):
        RecomputeConfig(window=window)  # type: ignore[arg-type]


def test_damping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"damping must be 1, got 0\.5"):
        RecomputeConfig(damping=0.5, window="auto")


@pytest.mark.parametrize("window", [1, 4, "all", "auto"])
def test_a_text_that_diverges_ends_and_harms_no_other(make_gpt: Make, window: int | str) -> None:
    model = make_gpt(3)
    with torch.no_grad():
        model.transformer.wte.weight[22] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num(0.0))
    feedback = Feedback(strength=0.5)
    ours = study(model, [[1, 2, 3, 4], [4, 5, 22, 7, 8]], feedback, window)
    alone = study(model, [[1, 2, 3, 4]], feedback, None)
    assert ours.outcomes == [[Outcome.SETTLED], [Outcome.DIVERGED]]
    assert (ours.log_probs[0] - alone.log_probs[0]).abs().max() <= EXACT
