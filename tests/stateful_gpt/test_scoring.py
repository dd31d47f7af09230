"""Predictions that are compared from pass to pass, against the softmax written out.

Shapes: B batch, R rows of it, T tokens, N positions, V vocabulary.
"""

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.model import GPT
from stateful_gpt.scoring import CHUNK, Predictions

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]

# float64, logits of order 10; the written-out logarithms of quotients cancel a few digits
ROUNDING = 1e-10


def softmax(model: GPT, hidden: Tensor) -> Tensor:
    """(..., V) probabilities by the definition."""
    exponentials = (hidden @ model.lm_head.weight.detach().T).exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(dim=-1)


@st.composite
def readings(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]], list[list[int]]]:
    """Batch, length, the range that each pass evaluates, and the rows that go on before it."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    ranges, keeps, rows = [(0, length)], [list(range(batch))], batch
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, length - 1))
        ranges.append((begin, draw(st.integers(begin + 1, length))))
        kept = sorted(draw(st.sets(st.integers(0, rows - 1), min_size=1)))
        keeps.append(kept)
        rows = len(kept)
    return batch, length, ranges, keeps


@given(seed=st.integers(0, 2**31), reading=readings())
@torch.no_grad()
def test_scores_and_divergences_are_their_definitions(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    reading: tuple[int, int, list[tuple[int, int]], list[list[int]]],
) -> None:
    batch, length, ranges, keeps = reading
    model, tokens = make_gpt(seed), make_tokens(seed + 1, batch, length)
    generator = torch.Generator().manual_seed(seed + 2)
    predictions = Predictions(model, batch=batch, length=length)
    plain = before = torch.zeros(batch, length, 23, dtype=torch.float64)
    effect = torch.zeros(batch, length, dtype=torch.float64)
    for number, ((begin, end), kept) in enumerate(zip(ranges, keeps, strict=True)):
        if len(kept) < len(tokens):
            predictions.keep(kept)
            tokens, plain, before, effect = (x[kept] for x in (tokens, plain, before, effect))
        shape = (len(kept), end - begin, 16)
        hidden = torch.randn(shape, generator=generator, dtype=torch.float64)
        scores = predictions.score(hidden, tokens, begin=begin, first=number == 0)
        now = before.clone()
        now[:, begin:end] = softmax(model, hidden)
        if number == 0:
            plain = now
        else:
            effect[:, begin:end] = kl(plain, now)[:, begin:end]
        step = torch.zeros_like(effect)
        if number > 0:
            step[:, begin:end] = kl(before, now)[:, begin:end]
        targets = tokens[:, begin + 1 : end + 1, None]
        count = targets.size(1)
        logits = hidden[:, :count] @ model.lm_head.weight.T
        expected = now[:, begin : begin + count].log().gather(2, targets).squeeze(2)
        assert scores.log_probs.shape == scores.logits.shape == (len(kept), count)
        if count:
            assert (scores.log_probs - expected).abs().max() <= ROUNDING
            assert (scores.logits - logits.gather(2, targets).squeeze(2)).abs().max() <= ROUNDING
        assert (predictions.kl_step - step).abs().max() <= ROUNDING
        assert (predictions.kl_effect - effect).abs().max() <= ROUNDING
        before = now


@torch.no_grad()
def test_chunks_of_positions_do_not_show(make_gpt: Make, make_tokens: Tokens) -> None:
    length = 2 * CHUNK // 3 + 5  # three rows of it need three chunks
    model, tokens = make_gpt(1, block_size=length), make_tokens(2, 3, length)
    first, second = torch.randn(
        2, 3, length, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    predictions = Predictions(model, batch=3, length=length)
    predictions.score(first, tokens, begin=0, first=True)
    scores = predictions.score(second, tokens, begin=0, first=False)
    p, q = softmax(model, first), softmax(model, second)
    assert (predictions.kl_step - kl(p, q)).abs().max() <= ROUNDING
    assert (predictions.kl_effect - kl(p, q)).abs().max() <= ROUNDING
    expected = q[:, :-1].log().gather(2, tokens[:, 1:, None]).squeeze(2)
    assert (scores.log_probs - expected).abs().max() <= ROUNDING


@given(seed=st.integers(0, 2**31))
@torch.no_grad()
def test_in_float32_equal_distributions_have_no_divergence(
    make_gpt: Make, make_tokens: Tokens, seed: int
) -> None:
    model, tokens = make_gpt(seed, dtype=torch.float32), make_tokens(seed + 1, 2, 9)
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(seed))
    predictions = Predictions(model, batch=2, length=9)
    predictions.score(hidden, tokens, begin=0, first=True)
    # the same states again, but for the last bit of each
    again = hidden * (1 + torch.finfo(torch.float32).eps)
    predictions.score(again, tokens, begin=0, first=False)
    for values in (predictions.kl_step, predictions.kl_effect):
        assert float(values.min()) >= 0.0
        assert float(values.max()) <= 1e-8
