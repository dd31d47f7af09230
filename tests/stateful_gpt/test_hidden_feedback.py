"""Hidden states fed back: what enters the embeddings, when it is final, and when it never is."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import Generation, Sampling, Start, generate
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.oracle import LeftToRight, disturbed_reading, left_to_right
from stateful_gpt.recompute import Outcome, RecomputeConfig, Recomputed
from stateful_gpt.scoring import score_tokens
from tests.recording import Seen, trajectory

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
WrittenOut = Callable[..., Tensor]

# float64 through two layers of width 16, logits of order 10, and a dozen passes of a map that may
# stretch differences
EXACT = 1e-10

REFERENCE = RecomputeConfig(iterations=25, tolerance=0)  # every pass, to the letter
ONE_BY_ONE = RecomputeConfig(window=1)

# hidden states alone, or beside each kind of token feedback
feedbacks = st.builds(
    Feedback,
    kind=st.sampled_from(list(FeedbackKind)),
    strength=st.floats(-1.0, 1.0),
    layers=st.none() | st.frozensets(st.integers(0, 1)),
    hidden_strength=st.sampled_from([-1.0, 0.3, 1.0]),
)


def alone(strength: float = 1.0, *, shift: int = 1) -> Feedback:
    return Feedback.of_kind("hidden_state", strength, shift=shift)  # type: ignore[arg-type]


def run(
    model: GPT, tokens: Tensor, feedback: Feedback, iterations: int, *, tolerance: float = 0
) -> tuple[Recomputed, list[Seen]]:
    config = RecomputeConfig(iterations=iterations, tolerance=tolerance)
    with torch.no_grad():
        return trajectory(model, tokens, feedback, config)


# --- what enters the embeddings -----------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    strength=st.floats(-2.0, 2.0).filter(bool),
    shift=st.sampled_from([0, 1]),
)
def test_a_pass_enriches_embeddings_as_the_definition_says(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out_hidden: WrittenOut,
    seed: int,
    length: int,
    strength: float,
    shift: int,
) -> None:
    model, tokens = make_gpt(seed, hidden_feedback=True), make_tokens(seed + 1, 1, length)
    _, seen = run(model, tokens, alone(strength, shift=shift), 3)
    before: list[Tensor | None] = [None] * length
    for iteration in seen:
        expected = written_out_hidden(model, tokens[0], before=before, strength=strength)
        assert (iteration.hidden[0] - expected).abs().max() <= EXACT
        before = list(expected) if shift == 0 else [None, *expected[:-1]]


@given(seed=st.integers(0, 2**31), length=st.integers(1, 9), feedback=feedbacks)
def test_both_feedbacks_act_at_once(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out_hidden: WrittenOut,
    seed: int,
    length: int,
    feedback: Feedback,
) -> None:
    model, tokens = make_gpt(seed, hidden_feedback=True), make_tokens(seed + 1, 1, length)
    _, seen = run(model, tokens, feedback, 3)
    first = seen[0].hidden
    scores = score_tokens(model, first, tokens)
    modulation = {}
    if feedback.kind is FeedbackKind.PROB:
        modulation["key_factor"] = (feedback.strength * scores.log_probs[0]).exp()
    elif feedback.kind is not FeedbackKind.NONE:
        logit = feedback.kind is FeedbackKind.LOGIT
        fed = scores.logits if logit else scores.log_probs
        modulation["key_bias"] = feedback.strength * fed[0]
    expected = written_out_hidden(
        model,
        tokens[0],
        layers=feedback.layers,
        before=[None, *first[0, :-1]],
        strength=feedback.hidden_strength,
        **modulation,
    )
    assert (seen[1].hidden[0] - expected).abs().max() <= EXACT


@pytest.mark.parametrize("shift", [0, 1])
def test_zero_strength_is_exactly_the_plain_model(
    make_gpt: Make, make_tokens: Tokens, shift: int
) -> None:
    model, tokens = make_gpt(3, hidden_feedback=True), make_tokens(4, 2, 9)
    _, seen = run(model, tokens, alone(0.0, shift=shift), 3)
    for iteration in seen:
        assert torch.equal(iteration.hidden, model.read(tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_with_a_new_gate_is_that_model_at_every_pass(
    make_gpt: Make, make_tokens: Tokens, tied: bool
) -> None:
    plain, tokens = make_gpt(5, tied=tied), make_tokens(6, 2, 9)
    model = GPT(replace(plain.config, hidden_feedback=True), tied=tied).double().eval()
    model.initialize(generator=torch.Generator().manual_seed(0))
    model.load_state_dict(plain.state_dict(), strict=False)
    _, seen = run(model, tokens, alone(), 3)
    for iteration in seen:
        assert torch.equal(iteration.hidden, plain.read(tokens))


def test_models_with_and_without_a_gate_begin_alike() -> None:
    models = []
    for hidden_feedback in (False, True):
        config = GPTConfig(8, 11, 2, 2, 8, hidden_feedback=hidden_feedback)
        model = GPT(config)
        model.initialize(generator=torch.Generator().manual_seed(1))
        models.append(model.state_dict())
    assert set(models[1]) - set(models[0]) == {
        f"gate.{part}.{kind}" for part in ("key", "value") for kind in ("weight", "bias")
    }
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name])


def test_hidden_states_need_a_gate(make_gpt: Make, make_tokens: Tokens) -> None:
    model, tokens = make_gpt(1), make_tokens(2, 1, 4)
    with pytest.raises(ValueError, match="no gate"):
        model.read(tokens, modulation=Modulation(hidden=model.read(tokens)))


# --- shift 1: the theorem -----------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), length=st.integers(1, 12), feedback=feedbacks)
def test_position_j_is_final_from_iteration_j_on(
    make_gpt: Make, make_tokens: Tokens, seed: int, length: int, feedback: Feedback
) -> None:
    # bit for bit: passes over one text have one shape
    model, tokens = make_gpt(seed, hidden_feedback=True), make_tokens(seed + 1, 2, length)
    _, seen = run(model, tokens, feedback, length + 3)
    for j in range(length):
        first = seen[max(j, 1) - 1]
        for later in seen[max(j, 1) :]:
            assert torch.equal(later.log_probs[:, j], first.log_probs[:, j])
            assert later.state is not None
            assert first.state is not None
            assert torch.equal(later.state[:, j], first.state[:, j])


@given(seed=st.integers(0, 2**31), length=st.integers(1, 12), feedback=feedbacks)
def test_iterates_reach_the_oracle_and_say_that_they_settled(
    make_gpt: Make, make_tokens: Tokens, seed: int, length: int, feedback: Feedback
) -> None:
    model, tokens = make_gpt(seed, hidden_feedback=True), make_tokens(seed + 1, 2, length)
    result, seen = run(model, tokens, feedback, max(1, length - 1))
    oracle = left_to_right(model, tokens, feedback)
    assert (seen[-1].log_probs - oracle).abs().max() <= EXACT
    assert result.outcomes == [Outcome.SETTLED] * 2


@given(seed=st.integers(0, 2**31), length=st.integers(1, 9), strength=st.floats(-1.5, 1.5))
def test_the_oracle_is_the_recurrence_over_tokens(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out_hidden: WrittenOut,
    seed: int,
    length: int,
    strength: float,
) -> None:
    """Each token's last hidden state goes into the next token's embedding: no passes at all."""
    model, tokens = make_gpt(seed, hidden_feedback=True), make_tokens(seed + 1, 1, length)
    before: list[Tensor | None] = [None]
    expected = [0.0]
    for t in range(length):
        hidden = written_out_hidden(
            model, tokens[0, : t + 1], before=before if strength else None, strength=strength
        )[-1]
        before.append(hidden)
        if t + 1 < length:
            logits = model.logits(hidden[None])[0]
            expected.append(logits.log_softmax(dim=0)[tokens[0, t + 1]].item())
    ours = left_to_right(model, tokens, alone(strength))[0]
    assert (ours - torch.tensor(expected, dtype=torch.float64)).abs().max() <= EXACT


def test_a_nudged_hidden_state_is_followed(make_gpt: Make, make_tokens: Tokens) -> None:
    model, tokens = make_gpt(8, block_size=48, hidden_feedback=True), make_tokens(9, 1, 48)
    assert disturbed_reading(model, tokens, alone(0.5), lengths=[48])[1] != [None]
    with pytest.raises(ValueError, match="cannot be read in order"):
        disturbed_reading(model, tokens, alone(0.5, shift=0), lengths=[48])


# --- generation at full depth -------------------------------------------------------------------


def generated(
    model: GPT,
    prompts: list[list[int]],
    feedback: Feedback,
    config: RecomputeConfig,
    *,
    new: int,
    start: Start = Start.CARRIED,
) -> Generation:
    return generate(
        model,
        prompts,
        max_new_tokens=new,
        feedback=feedback,
        config=config,
        start=start,
        sampling=Sampling(temperature=1.0),
        generators=torch.Generator().manual_seed(7),
    )


def assert_same(ours: Generation, theirs: Generation) -> None:
    assert ours.tokens == theirs.tokens
    for a, b in zip(ours.log_probs, theirs.log_probs, strict=True):
        assert (a - b).abs().max() <= EXACT


@pytest.mark.parametrize(
    "feedback", [alone(0.5), Feedback(strength=0.3, hidden_strength=0.5)], ids=["hidden", "both"]
)
def test_incremental_generation_is_full_recomputation_over_many_crops(
    make_gpt: Make, make_tokens: Tokens, feedback: Feedback
) -> None:
    model = make_gpt(11, block_size=24, hidden_feedback=True)
    prompt = make_tokens(12, 1, 5)[0].tolist()
    full = generated(model, [prompt], feedback, REFERENCE, new=40)
    assert set(full.outcomes[0]) == {Outcome.SETTLED}
    ours = generated(model, [prompt], feedback, ONE_BY_ONE, new=40)
    assert_same(ours, full)


def test_until_the_text_is_cropped_a_token_costs_one_pass_of_one_token(
    make_gpt: Make, make_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_gpt(13, block_size=24, hidden_feedback=True)
    sizes: list[int] = []
    read = model.read

    def counting(tokens: Tensor, **options: object) -> Tensor:
        sizes.append(tokens.size(1))
        return read(tokens, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "read", counting)
    generated(model, [make_tokens(14, 1, 4)[0].tolist()], alone(), ONE_BY_ONE, new=12)
    assert sizes[-12:] == [1] * 12


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    feedback=feedbacks,
    window=st.sampled_from([1, 3, "all", "auto", None]),
)
def test_every_window_generates_what_full_recomputation_does(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    lengths: list[int],
    feedback: Feedback,
    window: int | str | None,
) -> None:
    model = make_gpt(seed, block_size=8, hidden_feedback=True)
    prompts = [make_tokens(seed + i, 1, n)[0].tolist() for i, n in enumerate(lengths)]
    to_the_letter = RecomputeConfig(iterations=9, tolerance=0)  # 8 positions are final before
    full = generated(model, prompts, feedback, to_the_letter, new=6)
    ours = generated(model, prompts, feedback, RecomputeConfig(window=window), new=6)
    assert_same(ours, full)


# --- shift 0: nothing bounds it -----------------------------------------------------------------


def test_a_weak_feedback_of_every_position_to_itself_settles(
    make_gpt: Make, make_tokens: Tokens
) -> None:
    model, tokens = make_gpt(21, hidden_feedback=True), make_tokens(22, 1, 8)
    result, seen = run(model, tokens, alone(0.02, shift=0), 60, tolerance=1e-9)
    assert result.outcomes == [Outcome.WITHIN_TOLERANCE]
    assert len(seen) > 3, "not because nothing happened"


def test_a_strong_one_can_cycle(make_gpt: Make, make_tokens: Tokens) -> None:
    model, tokens = make_gpt(20, hidden_feedback=True), make_tokens(1, 1, 3)
    result, seen = run(model, tokens, alone(2.0, shift=0), 400, tolerance=1e-9)
    assert result.outcomes == [Outcome.CYCLE]
    period = next(
        p
        for p in range(2, 9)
        if torch.allclose(seen[-1].log_probs, seen[-1 - p].log_probs, atol=1e-10)
    )
    moved = (seen[-1].log_probs - seen[-2].log_probs).abs().max()
    assert period >= 2
    assert moved > 1e-3, "it is no fixed point"


def test_an_overflowing_one_diverges(make_gpt: Make, make_tokens: Tokens) -> None:
    model, tokens = make_gpt(25, hidden_feedback=True), make_tokens(26, 1, 5)
    result, seen = run(model, tokens, alone(1e308, shift=0), 20)
    assert result.outcomes == [Outcome.DIVERGED]
    assert len(seen) < 20


def test_what_has_no_reading_order_is_refused_one(make_gpt: Make, make_tokens: Tokens) -> None:
    model = make_gpt(1, hidden_feedback=True)
    with pytest.raises(ValueError, match="their own position"):
        LeftToRight(model, alone(shift=0), batch=1, capacity=4)
    with pytest.raises(ValueError, match="shift of hidden states must be 1"):
        generated(model, [[1, 2]], alone(shift=0), ONE_BY_ONE, new=1)
