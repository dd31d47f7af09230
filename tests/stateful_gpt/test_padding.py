"""Texts of different lengths in one padded batch: the padding changes nothing, provably.

Everything is compared in float64 with the same texts read one at a time, without padding.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stateful_gpt.depth import depth_profile
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT
from stateful_gpt.train import IGNORE, TrainingConfig, training_step

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]

# float64: sums of a hundred terms of order 1, in another order, through up to three passes
ROUNDING = 1e-11
RATE = 0.1
MODES = {
    "detached": {},
    "back-propagated through": {"through_passes": True},
    "an update after each": {"update_every_pass": True},
}

lengths_of_texts = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def pad(texts: list[Tensor], *, extra: int) -> Tensor:
    """(N, T + 1) ids with IGNORE on the right of each text, at least ``extra`` of it."""
    padded = torch.full((len(texts), max(map(len, texts)) + extra), IGNORE)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return padded


def one_at_a_time(model: GPT, texts: list[Tensor], *, passes: int, mode: str) -> list[float]:
    """Plain gradient descent on the texts, one after the other; the loss of each pass."""
    parameters = list(model.parameters())

    def descend(loss: Tensor) -> None:
        for p, g in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            if g is not None:  # the gate's, of a pass without feedback
                with torch.no_grad():
                    p -= RATE * g

    predicted = sum(len(text) - 1 for text in texts)
    fed: list[Tensor | None] = [None] * len(texts)
    losses = []
    for _ in range(passes):
        loss = torch.zeros((), dtype=torch.float64)
        for i, text in enumerate(texts):
            hidden = model.read(text[None, :-1], modulation=Modulation(hidden=fed[i]))  # (1, T, C)
            logits = model.lm_head(hidden)[0]
            loss = loss + F.cross_entropy(logits, text[1:], reduction="sum") / predicted
            handed_on = hidden if mode == "back-propagated through" else hidden.detach()
            fed[i] = torch.cat([torch.zeros_like(hidden[:, :1]), handed_on[:, :-1]], dim=1)
        losses.append(loss)
        if mode == "an update after each":
            descend(loss)
    if mode != "an update after each":
        descend(torch.stack(losses).mean())
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    lengths=lengths_of_texts,
    extra=st.integers(0, 3),
    passes=st.integers(1, 3),
    stateful=st.booleans(),
)
def test_a_padded_step_has_the_losses_and_gradients_of_its_texts(
    make_gpt: Make,
    make_tokens: Tokens,
    mode: str,
    seed: int,
    lengths: list[int],
    extra: int,
    passes: int,
    stateful: bool,
) -> None:
    passes = passes if stateful else 1
    texts = [make_tokens(seed + i, 1, n + 1)[0] for i, n in enumerate(lengths)]
    config = TrainingConfig(
        steps=1,
        warmup_steps=1,
        learning_rate=RATE,
        matrix_learning_rate=RATE,
        grad_clip=float("inf"),
        passes=passes,
        **MODES[mode],
    )
    padded, alone = (make_gpt(seed, hidden_feedback=stateful) for _ in range(2))
    parameters = list(padded.parameters())
    # plain descent: what a step does to the weights is its gradient
    optimizers = [torch.optim.SGD(parameters[:3]), torch.optim.SGD(parameters[3:])]
    losses = training_step(padded, optimizers, pad(texts, extra=extra), step=0, config=config)
    expected = one_at_a_time(alone, texts, passes=passes, mode=mode)
    assert losses == pytest.approx(expected, rel=ROUNDING)
    for ours, theirs in zip(padded.parameters(), alone.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= ROUNDING * max(1.0, theirs.abs().max().item())


@given(
    seed=st.integers(0, 2**31),
    lengths=lengths_of_texts,
    extra=st.integers(0, 3),
    depth=st.integers(0, 4),
    batch_size=st.integers(1, 4),
)
def test_a_padded_depth_profile_is_the_mean_over_its_texts(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    lengths: list[int],
    extra: int,
    depth: int,
    batch_size: int,
) -> None:
    model = make_gpt(seed, hidden_feedback=True)
    texts = [make_tokens(seed + i, 1, n + 1)[0] for i, n in enumerate(lengths)]
    profile = depth_profile(
        model, pad(texts, extra=extra), depth=depth, full=True, batch_size=batch_size
    )
    alone = [depth_profile(model, text[None], depth=depth, full=True) for text in texts]
    assert profile.tokens == sum(lengths)

    def mean(values: list[float]) -> float:
        return sum(n * value for n, value in zip(lengths, values, strict=True)) / sum(lengths)

    near = {"rel": ROUNDING, "abs": ROUNDING}
    for n in range(depth + 1):
        assert profile.nll[n] == pytest.approx(mean([one.nll[n] for one in alone]), **near)
    for n in range(depth):
        assert profile.kl[n] == pytest.approx(mean([one.kl[n] for one in alone]), **near)
    assert profile.nll_full is not None
    full = [one.nll_full for one in alone if one.nll_full is not None]
    assert profile.nll_full == pytest.approx(mean(full), **near)
