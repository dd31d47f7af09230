"""The theorem: position j is final from iteration max(j, 1) on, and the oracle is where it ends."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.model import GPT
from stateful_gpt.oracle import LeftToRight, left_to_right, lyapunov_exponent
from stateful_gpt.recompute import Iteration, RecomputeConfig, recompute
from stateful_gpt.solving import token_pass

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
WrittenOut = Callable[..., Tensor]

# The recursion multiplies a rounding error by some factor at every token, so a bound on the final
# difference is honest only where that factor is moderate: texts of up to 12 tokens and these
# strengths. For ``prob``, p ** strength with a negative strength and p near e**-10 multiplies
# values (and their errors) by e**(10 * |strength|), hence the narrower range below 0; for
# ``logit``, the raw logits of these models are larger than the log-probabilities' spread.
STRENGTHS = {
    FeedbackKind.LOG_PROB: st.floats(-1.0, 1.0),
    FeedbackKind.LOGIT: st.floats(-0.5, 0.5),
    FeedbackKind.PROB: st.floats(-0.3, 1.0),
    FeedbackKind.NONE: st.floats(-1.0, 1.0),
}

feedbacks = st.sampled_from(list(FeedbackKind)).flatmap(
    lambda kind: st.builds(
        Feedback,
        st.just(kind),
        STRENGTHS[kind],
        st.none() | st.frozensets(st.integers(0, 1), min_size=1),
    )
)


def passes(model: GPT, tokens: Tensor, feedback: Feedback, count: int) -> list[Tensor]:
    """What each of ``count`` passes said: (B, T) log-probabilities."""
    seen: list[Tensor] = []

    def observe(iteration: Iteration) -> None:
        seen.append(iteration.said.log_probs)

    with torch.no_grad():
        recompute(
            token_pass(model, tokens, feedback),
            config=RecomputeConfig(iterations=count),
            lengths=[tokens.size(1)] * len(tokens),
            observe=observe,
        )
    return seen


def fixed_point(
    written_out: WrittenOut, model: GPT, tokens: Tensor, feedback: Feedback
) -> tuple[Tensor, Tensor]:
    """(T,) log-probabilities, and (V,) logits of the next token: whole passes, token by token."""
    T = len(tokens)
    log_probs = torch.zeros(T, dtype=torch.float64)
    fed = torch.zeros(T, dtype=torch.float64)
    for j in range(1, T + 1):
        modulation = {}
        if feedback.kind is FeedbackKind.PROB:
            modulation["key_factor"] = (feedback.strength * fed[:j]).exp()
        elif feedback.kind is not FeedbackKind.NONE:
            modulation["key_bias"] = feedback.strength * fed[:j]
        logits = written_out(model, tokens[:j], layers=feedback.layers, **modulation)[-1]
        if j == T:
            return log_probs, logits
        log_probs[j] = logits.log_softmax(dim=0)[tokens[j]]
        fed[j] = logits[tokens[j]] if feedback.kind is FeedbackKind.LOGIT else log_probs[j]
    raise AssertionError


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 14),
    kind=st.sampled_from(list(FeedbackKind)),
    strength=st.floats(-8.0, 8.0),
    layers=st.none() | st.frozensets(st.integers(0, 1)),
)
def test_position_j_is_final_from_iteration_j_on(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    length: int,
    kind: FeedbackKind,
    strength: float,
    layers: frozenset[int] | None,
) -> None:
    # Bit for bit and at every strength: passes over one text have one shape, and no arithmetic
    # of a position before j touches an estimate that still moves.
    model, tokens = make_gpt(seed), make_tokens(seed + 1, 2, length)
    said = passes(model, tokens, Feedback(kind, strength, layers), length + 3)
    for j in range(length):
        first_final = said[max(j, 1) - 1][:, j]
        for later in said[max(j, 1) :]:
            assert torch.equal(later[:, j], first_final)


@given(seed=st.integers(0, 2**31), length=st.integers(1, 12), feedback=feedbacks)
def test_iterates_reach_the_oracle(
    make_gpt: Make, make_tokens: Tokens, seed: int, length: int, feedback: Feedback
) -> None:
    model, tokens = make_gpt(seed), make_tokens(seed + 1, 2, length)
    oracle = left_to_right(model, tokens, feedback)
    last = passes(model, tokens, feedback, max(1, length - 1))[-1]
    assert (last - oracle).abs().max() <= 1e-10


@given(seed=st.integers(0, 2**31), length=st.integers(1, 10), feedback=feedbacks)
def test_the_oracle_is_whole_passes_token_by_token(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    feedback: Feedback,
) -> None:
    model, tokens = make_gpt(seed), make_tokens(seed + 1, 1, length)
    expected, _ = fixed_point(written_out, model, tokens[0], feedback)
    assert (left_to_right(model, tokens, feedback)[0] - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("strength", [-1.0, -0.25, 0.25, 1.0])
def test_not_all_positions_are_final_at_once(
    make_gpt: Make, make_tokens: Tokens, strength: float
) -> None:
    # without this the theorem would hold of a feedback that does nothing
    model, tokens = make_gpt(1), make_tokens(2, 4, 12)
    said = passes(model, tokens, Feedback(strength=strength), 12)
    moved = [(after - before).abs().max().item() for before, after in pairwise(said)]
    assert all(step > 1e-9 for step in moved[:4])
    assert moved[-1] == 0.0


def test_reading_in_pieces_is_reading_at_once(make_gpt: Make, make_tokens: Tokens) -> None:
    model, tokens = make_gpt(1), make_tokens(2, 2, 11)
    feedback = Feedback(strength=0.7)
    reader = LeftToRight(model, feedback, batch=2)
    for piece in (tokens[:, :1], tokens[:, 1:5], tokens[:, 5:]):
        log_probs = reader.read(piece)
    assert torch.equal(log_probs, left_to_right(model, tokens, feedback))


def jacobian(model: GPT, tokens: Tensor, feedback: Feedback, state: Tensor) -> Tensor:
    """(T, T) derivatives of what a pass says by what it is fed."""

    def run(estimates: Tensor) -> Tensor:
        return token_pass(model, tokens, feedback)(estimates).log_probs[0]

    full: Tensor = torch.autograd.functional.jacobian(run, state)
    return full[:, 0]


@pytest.mark.parametrize("strength", [-0.6, -0.2, 0.2, 0.6])
def test_a_nudge_spreads_as_the_inverse_of_one_minus_the_jacobian(
    make_gpt: Make, make_tokens: Tokens, strength: float
) -> None:
    model, tokens = make_gpt(3), make_tokens(4, 1, 10)
    feedback = Feedback(strength=strength)
    still = left_to_right(model, tokens, feedback)
    J = jacobian(model, tokens, feedback, still)
    assert bool((J.triu() == 0).all())  # strictly lower triangular: an estimate sees earlier ones
    response = torch.linalg.inv(torch.eye(10, dtype=torch.float64) - J)
    for at in (1, 2, 5):
        nudges = torch.zeros(1, 10, dtype=torch.float64)
        nudges[0, at] = 1e-6
        moved = LeftToRight(model, feedback).read(tokens, nudges=nudges)
        slope = (moved - still)[0, at + 1 :] / 1e-6
        # a difference quotient at 1e-6 has an error of 1e-6 times second derivatives
        assert (slope - response[at + 1 :, at]).abs().max() <= 1e-4 * response.abs().max()


@pytest.mark.parametrize("strength", [-0.15, 0.15])
def test_lyapunov_exponent_is_the_slope_of_the_linear_response(
    make_gpt: Make, make_tokens: Tokens, strength: float
) -> None:
    T = 32
    model, tokens = make_gpt(5, block_size=T), make_tokens(6, 1, T)
    feedback = Feedback(strength=strength)
    still = left_to_right(model, tokens, feedback)
    J = jacobian(model, tokens, feedback, still)
    response = torch.linalg.inv(torch.eye(T, dtype=torch.float64) - J)
    at = sorted({int(x) for x in torch.linspace(1, T // 2, 8)})
    xs, ys = [], []
    for distance in range(1, T // 2):
        size = (sum((response[j + distance, j].item() * 1e-7) ** 2 for j in at) / len(at)) ** 0.5
        if not 1e-12 <= size <= 1e-3:
            break
        xs.append(distance)
        ys.append(size)
    slope = (
        torch.linalg.lstsq(
            torch.tensor([[float(x), 1.0] for x in xs], dtype=torch.float64),
            torch.tensor(ys, dtype=torch.float64).log()[:, None],
        )
        .solution[0, 0]
        .item()
    )
    measured = lyapunov_exponent(model, tokens[0], feedback)
    assert measured is not None
    # responses near 1e-12 nats carry a rounding of some 1e-14, which is 1 % of them
    assert measured == pytest.approx(slope, abs=0.02)
    assert measured < 0  # so weak a feedback dies out along the text


def test_disturbances_grow_under_a_strong_feedback(make_gpt: Make, make_tokens: Tokens) -> None:
    # Seed 1 for a reason: random attention reaches any distance, so that a weak feedback's response
    # is nearly flat and its small slope may have either sign; here it is clearly negative.
    T = 48
    model, tokens = make_gpt(1, block_size=T, n_layer=3), make_tokens(1, 1, T)
    weak = lyapunov_exponent(model, tokens[0], Feedback(strength=0.1))
    strong = lyapunov_exponent(model, tokens[0], Feedback(strength=-4.0))
    assert weak is not None
    assert strong is not None
    assert weak < -0.01
    assert strong > 0.1


@pytest.mark.parametrize(
    ("feedback", "length"),
    [
        (Feedback(FeedbackKind.NONE, 1.0), 24),
        (Feedback(FeedbackKind.LOG_PROB, 0.0), 24),
        (Feedback(FeedbackKind.LOG_PROB, 0.5), 15),
        (Feedback(FeedbackKind.LOG_PROB, 0.5), 1),
        (Feedback(FeedbackKind.LOG_PROB, 0.5, layers=()), 24),
    ],
)
def test_where_nothing_responds_the_exponent_is_missing(
    make_gpt: Make, make_tokens: Tokens, feedback: Feedback, length: int
) -> None:
    model, tokens = make_gpt(5, block_size=24), make_tokens(6, 1, length)
    assert lyapunov_exponent(model, tokens[0], feedback) is None
