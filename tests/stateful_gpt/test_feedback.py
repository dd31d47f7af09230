"""What a pass hands to the next, and that it acts on attention as its definition says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt import scoring
from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.scoring import (
    LOG_PROB_FLOOR,
    logit_chunks,
    mean_kl,
    score_targets,
    score_tokens,
)
from stateful_gpt.trajectory import trajectory
from tests.recording import one_pass

# float64 through a few layers of width 16, with logits of order 10
ROUNDING = 1e-11

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
WrittenOut = Callable[..., Tensor]

layer_choices = st.none() | st.sets(st.integers(0, 1))


def negative_log_probs(seed: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = -8 * torch.rand(1, length, generator=generator, dtype=torch.float64)
    values[:, 0] = 0.0
    return values


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    strength=st.floats(-1.5, 1.5),
    layers=layer_choices,
)
def test_log_prob_is_multiplying_rows_by_p_to_the_strength_and_renormalising(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    strength: float,
    layers: set[int] | None,
) -> None:
    model, tokens = make_gpt(seed), make_tokens(seed + 1, 1, length)
    estimates = negative_log_probs(seed + 2, length)
    feedback = Feedback(FeedbackKind.LOG_PROB, strength, layers)
    said = one_pass(model, tokens, feedback)(estimates)
    p = estimates[0].exp()
    expected = written_out(model, tokens[0], power=p**strength, layers=layers)
    log_probs = expected.log_softmax(dim=1)
    assert (model.logits(said.hidden)[0] - expected).abs().max() <= ROUNDING
    for j in range(1, length):
        # 1e-12 relative: the two ways round differently in each of the two layers
        assert said.log_probs[0, j].item() == pytest.approx(
            log_probs[j - 1, tokens[0, j]].item(), rel=1e-12, abs=1e-12
        )


@given(seed=st.integers(0, 2**31), strength=st.floats(-2, 2))
def test_the_identity_holds_for_one_row_of_attention_to_1e_12(seed: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(9, generator=generator, dtype=torch.float64)
    estimates = negative_log_probs(seed, 9)
    feedback = Feedback(FeedbackKind.LOG_PROB, strength)
    modulation = feedback.modulation(estimates)
    by_bias = scores if modulation.bias is None else scores + modulation.bias[0]
    rows = scores.exp() / scores.exp().sum() * estimates[0].exp() ** strength
    assert (by_bias.softmax(dim=0) - rows / rows.sum()).abs().max() <= 1e-12


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    strength=st.floats(-0.5, 1.5),
    layers=layer_choices,
)
def test_prob_multiplies_softmaxed_rows_and_does_not_renormalise(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    strength: float,
    layers: set[int] | None,
) -> None:
    model, tokens = make_gpt(seed), make_tokens(seed + 1, 1, length)
    estimates = negative_log_probs(seed + 2, length)
    feedback = Feedback(FeedbackKind.PROB, strength, layers)
    said = one_pass(model, tokens, feedback)(estimates)
    expected = written_out(
        model, tokens[0], key_factor=estimates[0].exp() ** strength, layers=layers
    )
    assert (model.logits(said.hidden)[0] - expected).abs().max() <= ROUNDING


def test_prob_at_strength_one_is_the_probability_itself() -> None:
    p = torch.tensor([[1.0, 0.5, 0.125]], dtype=torch.float64)
    modulation = Feedback(FeedbackKind.PROB, 1.0).modulation(p.log())
    assert modulation.bias is None
    assert modulation.factor is not None
    assert (modulation.factor - p).abs().max() <= 1e-15  # exp(log p): one rounding each


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    strength=st.floats(-1, 1),
    layers=layer_choices,
)
def test_logit_adds_the_raw_logit_of_the_pass_before(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    strength: float,
    layers: set[int] | None,
) -> None:
    model, tokens = make_gpt(seed), make_tokens(seed + 1, 1, length)
    feedback = Feedback(FeedbackKind.LOGIT, strength, layers)
    run_pass = one_pass(model, tokens, feedback)
    first = run_pass(None)
    second = run_pass(first.state)

    plain = written_out(model, tokens[0])
    raw = torch.zeros(length, dtype=torch.float64)  # nothing predicts position 0: bias 0
    for j in range(1, length):
        raw[j] = plain[j - 1, tokens[0, j]]
    assert (first.state[0] - raw).abs().max() <= ROUNDING
    expected = written_out(model, tokens[0], key_bias=strength * raw, layers=layers)
    assert (model.logits(second.hidden)[0] - expected).abs().max() <= 10 * ROUNDING
    # what it reports stays a log-probability
    for j in range(1, length):
        wanted = expected[j - 1].log_softmax(dim=0)[tokens[0, j]].item()
        assert second.log_probs[0, j].item() == pytest.approx(wanted, abs=1e-10)


@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from([FeedbackKind.LOG_PROB, FeedbackKind.LOGIT]),
    shift=st.floats(-20, 20),
)
def test_a_constant_added_to_all_estimates_changes_nothing(
    make_gpt: Make, make_tokens: Tokens, seed: int, kind: FeedbackKind, shift: float
) -> None:
    model, tokens = make_gpt(seed), make_tokens(seed + 1, 2, 8)
    run_pass = one_pass(model, tokens, Feedback(kind, 0.7))
    estimates = negative_log_probs(seed, 8).expand(2, 8)
    difference = run_pass(estimates + shift).hidden - run_pass(estimates).hidden
    assert difference.abs().max() <= ROUNDING  # softmax ignores constants


@pytest.mark.parametrize("kind", list(FeedbackKind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_strength_is_exactly_the_plain_model(
    make_gpt: Make, make_tokens: Tokens, kind: FeedbackKind, dtype: torch.dtype
) -> None:
    model, tokens = make_gpt(3, dtype=dtype), make_tokens(4, 3, 12)
    plain = model(tokens)
    wild = torch.full((3, 12), -1e4, dtype=dtype)
    strengths = [0.0, -0.0, 0] if kind is not FeedbackKind.NONE else [0.0, -0.0, 1.0, -3.0]
    for strength in strengths:
        run_pass = one_pass(model, tokens, Feedback(kind, strength))
        assert torch.equal(run_pass(None).hidden, plain)
        assert torch.equal(run_pass(wild).hidden, plain)


@pytest.mark.parametrize("kind", list(FeedbackKind))
def test_no_layers_is_the_plain_model_too(
    make_gpt: Make, make_tokens: Tokens, kind: FeedbackKind
) -> None:
    model, tokens = make_gpt(3), make_tokens(4, 2, 9)
    run_pass = one_pass(model, tokens, Feedback(kind, 1.0, layers=()))
    assert torch.equal(run_pass(negative_log_probs(1, 9).expand(2, 9)).hidden, model(tokens))


@pytest.mark.parametrize("kind", list(FeedbackKind))
def test_the_first_pass_is_the_plain_model_at_any_strength(
    make_gpt: Make, make_tokens: Tokens, kind: FeedbackKind
) -> None:
    model, tokens = make_gpt(5), make_tokens(6, 2, 9)
    assert torch.equal(one_pass(model, tokens, Feedback(kind, 1.3))(None).hidden, model(tokens))


@pytest.mark.parametrize("kind", [FeedbackKind.LOG_PROB, FeedbackKind.LOGIT, FeedbackKind.PROB])
def test_feedback_does_change_the_model(
    make_gpt: Make, make_tokens: Tokens, kind: FeedbackKind
) -> None:
    model, tokens = make_gpt(5), make_tokens(6, 2, 9)
    run_pass = one_pass(model, tokens, Feedback(kind, 0.5))
    first = run_pass(None)
    second = run_pass(first.state)
    assert torch.equal(second.log_probs[:, :2], first.log_probs[:, :2])  # bit for bit: see oracle
    assert (second.log_probs - first.log_probs).abs().amax(dim=1).min() > 0.01


@given(seed=st.integers(0, 2**31), length=st.integers(1, 9), chunk=st.integers(1, 20))
def test_scores_are_log_softmax_of_full_logits_whatever_the_chunk(
    make_gpt: Make, make_tokens: Tokens, seed: int, length: int, chunk: int
) -> None:
    model, tokens = make_gpt(seed), make_tokens(seed + 1, 2, length)
    hidden = model(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "CHUNK", chunk)
        scores = score_tokens(model, hidden, tokens)
    logits = hidden @ model.lm_head.weight.T
    for b in range(2):
        assert scores.log_probs[b, 0] == 0.0
        assert scores.logits[b, 0] == 0.0
        for j in range(1, length):
            row = logits[b, j - 1]
            raw = row[tokens[b, j]]
            log_prob = raw - row.exp().sum().log()
            assert abs(scores.logits[b, j] - raw) <= ROUNDING
            assert abs(scores.log_probs[b, j] - log_prob) <= ROUNDING


def test_never_more_logits_at_once_than_a_chunk(make_gpt: Make, make_tokens: Tokens) -> None:
    model = make_gpt(1, block_size=200)
    hidden = model(make_tokens(2, 1, 194))[0]
    sizes = [tuple(logits.shape) for logits in logit_chunks(model, hidden)]
    assert sizes == [(64, 23), (64, 23), (64, 23), (2, 23)]


def test_an_impossible_token_has_the_floor_and_feeding_it_back_stays_finite(
    make_gpt: Make, make_tokens: Tokens
) -> None:
    model, tokens = make_gpt(1, tied=False), make_tokens(2, 1, 6)
    tokens[0, 3] = 5
    tokens[0, [0, 1, 2, 4, 5]] = 6
    with torch.no_grad():
        model.lm_head.weight[5] = 0.0
        model.lm_head.weight.mul_(1e7)  # logits of millions: one token takes all
    for kind in (FeedbackKind.LOG_PROB, FeedbackKind.PROB):
        run_pass = one_pass(model, tokens, Feedback(kind, 0.5))
        said = run_pass(run_pass(None).state)
        assert said.log_probs.min() == LOG_PROB_FLOOR
        assert bool(said.log_probs.isfinite().all())
        assert bool(said.hidden.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_estimates_of_a_low_precision_model_are_float32(
    make_gpt: Make, make_tokens: Tokens, dtype: torch.dtype
) -> None:
    model, tokens = make_gpt(1, dtype=dtype), make_tokens(2, 1, 6)
    said = one_pass(model, tokens, Feedback())(None)
    assert said.hidden.dtype == dtype
    assert said.log_probs.dtype == torch.float32
    assert one_pass(model, tokens[:, :1], Feedback())(None).log_probs.dtype == torch.float32


@given(seed=st.integers(0, 2**31), count=st.sampled_from([1, 7, 400]))
def test_mean_kl_is_its_definition(make_gpt: Make, seed: int, count: int) -> None:
    model = make_gpt(seed)
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, count, 16, generator=generator, dtype=torch.float64)
    p, q = ((x @ model.lm_head.weight.T).softmax(dim=1) for x in (a, b))
    expected = (p * (p / q).log()).sum(dim=1).mean().item()
    with torch.no_grad():
        # the definition is written with logarithms of quotients: cancellation costs a few digits
        assert mean_kl(model, a, b) == pytest.approx(expected, rel=1e-9)
        assert mean_kl(model, a, a) == 0.0


def test_score_targets_takes_any_leading_shape(make_gpt: Make) -> None:
    model = make_gpt(1)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 3, 20, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(23, (2, 3, 20), generator=generator)  # two chunks
    scores = score_targets(model, hidden, targets)
    expected = (hidden @ model.lm_head.weight.T).log_softmax(dim=-1)
    wanted = expected.gather(-1, targets[..., None]).squeeze(-1)
    assert (scores.log_probs - wanted).abs().max() <= ROUNDING


def test_a_name_is_no_kind_and_a_shift_is_of_one_token_at_most() -> None:
    with pytest.raises(ValueError, match=r"kind must be a FeedbackKind, got 'prob'.*of_kind"):
        Feedback(kind="prob")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shift must be 0 or 1, got 2"):
        Feedback(shift=2)  # type: ignore[arg-type]
    assert Feedback.of_kind("prob", 0.5) == Feedback(FeedbackKind.PROB, 0.5)


@pytest.mark.parametrize(
    ("kind", "chosen", "words"),
    [
        ("hidden_state", {"layers": [0]}, r"layers must be None .* got \[0\] and 0\.0"),
        ("hidden_state", {"hidden_strength": 0.5}, r"hidden_strength 0 .* got None and 0\.5"),
        ("logprob", {}, "kind must be one of log_prob, logit, prob, none, hidden_state, got 'logp"),
    ],
)
def test_what_a_kind_would_drop_is_refused(kind: str, chosen: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Feedback.of_kind(kind, 1.0, **chosen)


@pytest.mark.parametrize("layers", [1, iter([0, 1])])
def test_layers_that_can_be_looked_at_but_once_are_refused(layers: Any) -> None:
    # an iterator would be at its end before the first pass, and nothing be modulated
    with pytest.raises(ValueError, match="layers must be None or a collection of numbers, got"):
        Feedback(layers=layers)


@pytest.mark.parametrize("layer", [-1, 0.5, 2])
def test_a_layer_that_the_model_lacks_is_refused(make_gpt: Make, layer: Any) -> None:
    model, feedback = make_gpt(1), Feedback(layers=[0, layer])
    for read in (trajectory, left_to_right):
        with pytest.raises(ValueError, match=f"layers must be from 0 to 1, got {layer}"):
            read(model, torch.tensor([[1, 2, 3]]), feedback)
