"""The theorem: position j is final from iteration max(j, 1) on, and the oracle is where it ends."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.checkpoint import load_checkpoint
from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.model import GPT
from stateful_gpt.oracle import LINEAR_RANGE, NUDGE, LeftToRight, disturbed_reading, left_to_right
from stateful_gpt.recompute import RecomputeConfig
from tests.recording import one_pass, trajectory

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
    with torch.no_grad():
        config = RecomputeConfig(iterations=count, tolerance=0)
        return [seen.log_probs for seen in trajectory(model, tokens, feedback, config)[1]]


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


@pytest.mark.parametrize("strength", [-1.0, -2.0, -4.0])
def test_a_factor_is_the_same_in_every_precision(strength: float) -> None:
    """The exact solution of a float32 run is read in float64, also where factors are bounded."""
    model, feedback = load_checkpoint("bundled").model, Feedback(FeedbackKind.PROB, strength)
    tokens = torch.tensor([[1]])
    for _ in range(7):  # each rather unlikely
        logits = model.logits(model.read(tokens)[:, -1])
        tokens = torch.cat([tokens, logits.argsort(dim=1)[:, [30]]], dim=1)
    single = left_to_right(model, tokens, feedback)
    double = left_to_right(model.in_float64(), tokens, feedback)
    assert ((strength * double).max() > 30) == (strength <= -2), "where the bound is reached"
    # rounding of float32, 6e-8 of about 10 nats, at most a thousand times larger by feedback
    assert (single - double).abs().max() <= 2e-3


def test_reading_in_pieces_is_reading_at_once(make_gpt: Make, make_tokens: Tokens) -> None:
    model, tokens = make_gpt(1), make_tokens(2, 2, 11)
    feedback = Feedback(strength=0.7)
    reader = LeftToRight(model, feedback, batch=2, capacity=11)
    for piece in (tokens[:, :1], tokens[:, 1:5], tokens[:, 5:]):
        log_probs = reader.read(piece)
    assert torch.equal(log_probs, left_to_right(model, tokens, feedback))


def jacobian(model: GPT, tokens: Tensor, feedback: Feedback, state: Tensor) -> Tensor:
    """(T, T) derivatives of what a pass says by what it is fed."""

    def run(estimates: Tensor) -> Tensor:
        return one_pass(model, tokens, feedback)(estimates).log_probs[0]

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
        moved = LeftToRight(model, feedback, batch=1, capacity=10).read(tokens, nudges=nudges)
        slope = (moved - still)[0, at + 1 :] / 1e-6
        # a difference quotient at 1e-6 has an error of 1e-6 times second derivatives
        assert (slope - response[at + 1 :, at]).abs().max() <= 1e-4 * response.abs().max()


def growth(model: GPT, tokens: Tensor, feedback: Feedback) -> float | None:
    return disturbed_reading(model, tokens, feedback, lengths=[tokens.size(1)])[1][0]


def test_lyapunov_exponents_are_read_in_float64_whatever_the_model_is_in(
    make_gpt: Make, make_tokens: Tokens
) -> None:
    model, tokens = make_gpt(5, block_size=32, dtype=torch.float32), make_tokens(6, 1, 32)
    found = growth(model, tokens, Feedback(strength=0.15))
    assert found is not None
    assert found == growth(model.in_float64(), tokens, Feedback(strength=0.15))
    assert model.dtype == torch.float32


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
    measured = growth(model, tokens, feedback)
    assert measured is not None
    # responses near 1e-12 nats carry a rounding of some 1e-14, which is 1 % of them
    assert measured == pytest.approx(slope, abs=0.02)
    assert measured < 0  # so weak a feedback dies out along the text


def test_disturbances_grow_under_a_strong_feedback(make_gpt: Make, make_tokens: Tokens) -> None:
    # Seed 1 for a reason: random attention reaches any distance, so that a weak feedback's response
    # is nearly flat and its small slope may have either sign; here it is clearly negative.
    T = 48
    model, tokens = make_gpt(1, block_size=T, n_layer=3), make_tokens(1, 1, T)
    weak = growth(model, tokens, Feedback(strength=0.1))
    strong = growth(model, tokens, Feedback(strength=-4.0))
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
    assert growth(model, tokens, feedback) is None


def from_the_start(
    model: GPT, text: Tensor, feedback: Feedback, *, starts: int = 8
) -> float | None:
    """The exponent of (T,) ids, with every copy read from the first token on."""
    T = len(text)
    at = sorted({int(x) for x in torch.linspace(1, T // 2, starts)})
    nudges = torch.zeros(len(at) + 1, T, dtype=torch.float64)
    for row, position in enumerate(at):
        nudges[row + 1, position] = NUDGE
    reader = LeftToRight(model, feedback, batch=len(at) + 1, capacity=T)
    log_probs = reader.read(text.expand(len(at) + 1, T), nudges=nudges)
    response = (log_probs[1:] - log_probs[0]).abs()
    xs, ys = [], []
    for distance in range(1, T // 2):
        values = [response[row, position + distance].item() for row, position in enumerate(at)]
        size = (sum(value**2 for value in values) / len(at)) ** 0.5
        if not LINEAR_RANGE[0] <= size <= LINEAR_RANGE[1]:
            break
        xs.append([float(distance), 1.0])
        ys.append([size])
    if len(xs) < 4:
        return None
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (xs, ys))
    return torch.linalg.lstsq(x, y.log()).solution[0, 0].item()


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(10, 40), min_size=1, max_size=4),
    strength=st.floats(-0.6, 0.6).filter(lambda strength: abs(strength) > 0.01),
    hidden_strength=st.sampled_from([0.0, 0.5]),
)
def test_the_exponents_of_a_batch_are_those_of_its_texts_read_from_the_start(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    lengths: list[int],
    strength: float,
    hidden_strength: float,
) -> None:
    model = make_gpt(seed, block_size=40, hidden_feedback=True)
    tokens = make_tokens(seed + 1, len(lengths), max(lengths))  # behind each length: any ids
    feedback = Feedback(strength=strength, hidden_strength=hidden_strength)
    _, together = disturbed_reading(model, tokens, feedback, lengths=lengths)
    for row, length in enumerate(lengths):
        text = tokens[row, :length]
        expected = from_the_start(model, text, feedback) if length >= 16 else None
        for ours in (together[row], growth(model, text[None], feedback)):
            if expected is None:
                assert ours is None
            else:
                # responses of 1e-7 to differences that round by 1e-15 have 8 digits, and
                # responses that died out to 1e-12 have three
                assert ours == pytest.approx(expected, abs=1e-3)


@given(
    seed=st.integers(0, 2**31),
    pieces=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    hidden_strength=st.sampled_from([0.0, 0.5]),
)
def test_a_reader_goes_on_with_chosen_rows_and_may_be_set_back(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    pieces: list[int],
    rows: list[int],
    hidden_strength: float,
) -> None:
    first, middle, last = pieces
    model = make_gpt(seed, hidden_feedback=True)
    feedback = Feedback(strength=0.4, hidden_strength=hidden_strength)
    tokens = make_tokens(seed + 1, 3, sum(pieces))
    reader = LeftToRight(model, feedback, batch=3, capacity=sum(pieces))
    reader.read(tokens[:, :first])
    # read with a disturbance, and forgotten
    reader.read(make_tokens(seed + 2, 3, middle), nudges=torch.ones(3, middle).double())
    reader.set_back(first)
    expected = left_to_right(model, tokens, feedback)
    next_one = reader.score_next(tokens[:, first])
    assert (next_one - expected[:, first]).abs().max() <= 1e-10  # as above
    reader.read(tokens[:, first:-last])
    reader.keep(rows)
    ours = reader.read(tokens[rows, -last:])
    assert (ours - expected[rows]).abs().max() <= 1e-10
    reader.set_back(0)
    ours = reader.read(tokens[rows])
    assert (ours - expected[rows]).abs().max() <= 1e-10
