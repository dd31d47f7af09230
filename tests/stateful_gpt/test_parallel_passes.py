"""Training in parallel passes: whose gradients flow where; and losses by depth."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stateful_gpt.depth import KL_FLOOR, DepthProfile, depth_profile
from stateful_gpt.feedback import Feedback
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.recompute import RecomputeConfig
from stateful_gpt.train import IGNORE, TrainingConfig, make_optimizers, passes_at, training_step
from tests.recording import trajectory

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]

ROUNDING = 1e-12  # float64, sums of some hundred terms of order 1


def trainable() -> GPT:
    model = GPT(GPTConfig(12, 23, 2, 2, 16, hidden_feedback=True))
    model.initialize(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # an open gate: at 0 its key would have no gradient
        model.gate.value.weight.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    return model.double()


def losses_by_pass(model: GPT, windows: Tensor, passes: int, *, detached: bool) -> list[Tensor]:
    """Written from the definition, with whole logits."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    losses, hidden = [], None
    for _ in range(passes):
        fed = None
        if hidden is not None:
            fed = torch.zeros_like(hidden)
            fed[:, 1:] = hidden[:, :-1].detach() if detached else hidden[:, :-1]
        hidden = model.read(inputs, modulation=Modulation(hidden=fed))
        losses.append(F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten()))
    return losses


class Recording(torch.optim.SGD):
    """Plain gradient descent that remembers the gradients it was given."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.seen: list[list[Tensor]] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        self.seen.append(
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        )
        super().step()


def idle() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("through", [False, True])
def test_the_gradient_is_that_of_the_mean_loss_over_passes(passes: int, through: bool) -> None:
    model = trainable()
    windows = torch.arange(26).view(2, 13) % 23
    expected = losses_by_pass(model, windows, passes, detached=not through)
    wanted = torch.autograd.grad(
        torch.stack(expected).mean(), list(model.parameters()), allow_unused=True
    )
    optimizer = Recording(model)
    config = TrainingConfig(
        steps=9, warmup_steps=1, grad_clip=1e9, passes=passes, through_passes=through
    )
    found = training_step(model, [optimizer, idle()], windows, step=0, config=config)
    assert found == pytest.approx([loss.item() for loss in expected], rel=ROUNDING)
    assert len(optimizer.seen) == 1
    for (name, _), one, other in zip(
        model.named_parameters(), wanted, optimizer.seen[0], strict=True
    ):
        reference = torch.zeros_like(other) if one is None else one
        assert (reference - other).abs().max() <= ROUNDING, name


def test_detached_and_back_propagated_passes_differ_from_the_second_on() -> None:
    windows = torch.arange(26).view(2, 13) % 23
    gradients = []
    for through in (False, True):
        model = trainable()
        optimizer = Recording(model)
        config = TrainingConfig(
            steps=9, warmup_steps=1, grad_clip=1e9, passes=2, through_passes=through
        )
        training_step(model, [optimizer, idle()], windows, step=0, config=config)
        gradients.append(optimizer.seen[0])
    assert max((a - b).abs().max() for a, b in zip(*gradients, strict=True)) > 1e-4


def test_an_update_after_each_pass_is_as_many_updates() -> None:
    windows = torch.arange(26).view(2, 13) % 23
    config = TrainingConfig(steps=9, warmup_steps=1, passes=3, update_every_pass=True)
    model = trainable()
    optimizers = make_optimizers(model, config)
    found = training_step(model, optimizers, windows, step=0, config=config)

    other = trainable()
    others = make_optimizers(other, config)
    hidden, expected = None, []
    for _ in range(3):
        fed = None
        if hidden is not None:
            fed = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
        out = other.read(windows[:, :-1], modulation=Modulation(hidden=fed))
        loss = F.cross_entropy(other.lm_head(out).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), config.grad_clip)
        for optimizer, rate in zip(
            others, (config.matrix_learning_rate, config.learning_rate), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        hidden = out.detach()
        expected.append(loss.item())
    assert found == pytest.approx(expected, rel=1e-9)  # Muon computes in bfloat16
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-9


def test_a_gradient_through_updated_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="choose through_passes or update_every_pass"):
        TrainingConfig(steps=1, passes=2, through_passes=True, update_every_pass=True)


def test_the_number_of_passes_is_drawn_evenly_and_again_the_same() -> None:
    config = TrainingConfig(steps=1, passes=3, draw_passes=True)
    drawn = [passes_at(step, config, seed=5) for step in range(600)]
    assert drawn == [passes_at(step, config, seed=5) for step in range(600)]
    assert drawn != [passes_at(step, config, seed=6) for step in range(600)]
    # 200 each expected, with a standard deviation of 11.5
    assert all(140 < drawn.count(n) < 260 for n in (1, 2, 3))
    assert passes_at(3, TrainingConfig(steps=1, passes=3), seed=0) == 3
    windows = torch.arange(26).view(2, 13) % 23
    for step in range(5):  # a step of training makes them
        losses = training_step(trainable(), [idle()] * 2, windows, step=step, config=config, seed=5)
        assert len(losses) == drawn[step]


@pytest.mark.parametrize("through", [False, True])
def test_it_learns_to_use_what_it_is_fed(through: bool) -> None:
    """The marker at the start decides every later token; one layer alone sees it, too, but the
    loss of the fed pass has to fall and to stay low at every further depth."""
    chance = torch.Generator().manual_seed(3)
    model = GPT(GPTConfig(10, 8, 1, 1, 16, hidden_feedback=True))
    model.initialize(generator=chance)
    config = TrainingConfig(
        steps=60, warmup_steps=5, learning_rate=2e-2, passes=2, through_passes=through
    )
    optimizers = make_optimizers(model, config)
    for step in range(60):
        rows = torch.randint(4, (16, 1), generator=chance) + torch.arange(11) * 2
        losses = training_step(model, optimizers, rows % 8, step=step, config=config)
    assert losses[0] < 0.5
    assert losses[1] < 0.5
    rows = (torch.arange(4)[:, None] + torch.arange(11) * 2) % 8
    profile = depth_profile(model, rows, depth=6, full=True)
    assert max(*profile.nll, profile.nll_full or 0.0) < 1.0


# --- by depth -----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(2, 10), min_size=1, max_size=4),
    batch_size=st.integers(1, 4),
)
def test_a_depth_is_a_pass_of_the_recompute_loop_and_padding_changes_nothing(
    make_gpt: Make, make_tokens: Tokens, seed: int, lengths: list[int], batch_size: int
) -> None:
    model = make_gpt(seed, hidden_feedback=True)
    texts = [make_tokens(seed + i, 1, n)[0] for i, n in enumerate(lengths)]
    windows = torch.full((len(texts), 11), IGNORE)
    for row, text in enumerate(texts):
        windows[row, : len(text)] = text
    profile = depth_profile(model, windows, depth=3, full=True, batch_size=batch_size)
    nll, kl, full, count = torch.zeros(4), torch.zeros(3), 0.0, 0
    nll, kl = nll.double(), kl.double()
    for text in texts:
        n = len(text) - 1
        _, seen = trajectory(
            model,
            text[None, :-1],
            Feedback.of_kind("hidden_state", 1.0),
            RecomputeConfig(iterations=max(4, n), tolerance=0),
        )
        logs = [model.logits(i.hidden[0]).log_softmax(dim=1) for i in seen]
        for depth in range(4):
            nll[depth] -= logs[depth].gather(1, text[1:, None]).sum()
        for depth in range(3):
            kl[depth] += (logs[depth].exp() * (logs[depth] - logs[depth + 1])).sum()
        full -= logs[-1].gather(1, text[1:, None]).sum().item()  # T - 1 feedbacks or more
        count += n
    assert profile.tokens == count
    assert profile.nll == pytest.approx((nll / count).tolist(), abs=1e-10)
    assert profile.kl == pytest.approx((kl / count).tolist(), abs=1e-10)
    assert profile.nll_full == pytest.approx(full / count, abs=1e-10)


@pytest.mark.parametrize(
    ("kl", "broken_at"),
    [
        ([0.3, 0.2, 0.1], None),
        ([0.3, 0.3, 0.1], 1),
        ([0.3, 0.2, 0.25], 2),
        ([0.3, KL_FLOOR / 9, KL_FLOOR / 2], None),  # rounding moves, distributions do not
        ([0.3], None),
        ([0.3, math.nan], 1),
    ],
)
def test_the_seeds_inequality_is_judged_at_every_depth(
    kl: list[float], broken_at: int | None
) -> None:
    profile = DepthProfile(nll=[1.0] * (len(kl) + 1), kl=kl, nll_full=None, tokens=5)
    assert profile.broken_at == broken_at
