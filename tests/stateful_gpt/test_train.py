"""Training: the loss and its gradients, the schedule, the data order."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from experiments.train.corpus import Corpus
from stateful_gpt.depth import depth_profile
from stateful_gpt.feedback import Feedback
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.oracle import left_to_right
from stateful_gpt.train import (
    IGNORE,
    TrainingConfig,
    make_optimizers,
    next_token_loss,
    schedule,
    training_step,
)
from stateful_gpt.trajectory import trajectory

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]

# float64, sums of up to a hundred losses of a few nats each
ROUNDING = 1e-12


@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    chunk=st.integers(1, 30),
)
def test_loss_is_cross_entropy_of_full_logits(
    make_gpt: Make, make_tokens: Tokens, seed: int, batch: int, length: int, chunk: int
) -> None:
    model, windows = make_gpt(seed), make_tokens(seed, batch, length + 1)
    hidden = model(windows[:, :-1])
    logits = (hidden @ model.lm_head.weight.T).flatten(0, 1)
    expected = F.cross_entropy(logits, windows[:, 1:].flatten())
    loss = next_token_loss(model, hidden, windows[:, 1:], chunk=chunk)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=ROUNDING)


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    extra=st.integers(0, 3),
)
def test_padding_changes_neither_loss_nor_gradients(
    make_gpt: Make, make_tokens: Tokens, seed: int, lengths: list[int], extra: int
) -> None:
    model = make_gpt(seed)
    texts = [make_tokens(seed + i, 1, n + 1)[0] for i, n in enumerate(lengths)]
    padded = torch.full((len(texts), max(lengths) + 1 + extra), IGNORE)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    loss = next_token_loss(model, model(padded[:, :-1].clamp_min(0)), padded[:, 1:])

    alone = torch.zeros((), dtype=torch.float64)
    for text in texts:
        logits = model.lm_head(model(text[None, :-1]))[0]
        alone = alone + F.cross_entropy(logits, text[1:], reduction="sum")
    alone = alone / sum(lengths)

    assert loss.item() == pytest.approx(alone.item(), rel=ROUNDING)
    for ours, theirs in zip(gradients(model, loss), gradients(model, alone), strict=True):
        assert (ours - theirs).abs().max() <= ROUNDING * max(1.0, theirs.abs().max().item())


def test_schedule_warms_up_and_falls_along_a_cosine() -> None:
    config = TrainingConfig(steps=110, warmup_steps=10, final_fraction=0.1)
    for step in range(10):
        assert schedule(step, config) == pytest.approx((step + 1) / 10)
    assert schedule(10, config) == 1.0
    assert schedule(60, config) == pytest.approx(0.55)  # half way between 1 and 0.1
    assert schedule(35, config) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert schedule(110, config) == pytest.approx(0.1)
    assert schedule(500, config) == pytest.approx(0.1)
    factors = [schedule(step, config) for step in range(10, 111)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (5, 5), (3, 50)])
def test_short_trainings_have_a_schedule_too(steps: int, warmup: int) -> None:
    config = TrainingConfig(steps=steps, warmup_steps=warmup)
    assert all(0 < schedule(step, config) <= 1 for step in range(steps))


def batch_at(step: int, tokens: Tensor, *, size: int, length: int, seed: int) -> Tensor:
    return Corpus(tokens, characters=0, block_size=length).batch(step, size=size, seed=seed)


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    tokens = torch.arange(1000)

    def at(step: int, seed: int) -> Tensor:
        return batch_at(step, tokens, size=4, length=16, seed=seed)

    first = at(7, 3)
    torch.manual_seed(99)
    torch.rand(5)
    state = torch.random.get_rng_state()
    at(6, 3)
    assert torch.equal(at(7, 3), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(at(8, 3), first)
    assert not torch.equal(at(7, 4), first)
    assert first.shape == (4, 17)
    assert bool((first - first[:, :1] == torch.arange(17)).all())  # consecutive tokens


def test_batches_reach_every_window_of_the_corpus_and_no_further() -> None:
    tokens = torch.arange(10)
    starts = {
        int(row[0])
        for step in range(50)
        for row in batch_at(step, tokens, size=8, length=4, seed=0)
    }
    assert starts == {0, 1, 2, 3, 4, 5}
    assert batch_at(0, tokens[:5], size=2, length=4, seed=0).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_optimizer_and_muon_only_matrices_of_blocks(
    make_gpt: Make, tied: bool
) -> None:
    model = make_gpt(1, tied=tied)
    muon, adamw = make_optimizers(model, TrainingConfig(steps=1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    by_adamw = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert sorted(by_muon + by_adamw) == sorted(names.values())
    expected = [name for name in names.values() if ".h." in name and name.endswith(".weight")]
    assert sorted(by_muon) == sorted(name for name in expected if ".ln_" not in name)


def trainable(dtype: torch.dtype = torch.float32) -> GPT:
    config = GPTConfig(block_size=16, vocab_size=23, n_layer=2, n_head=2, n_embd=16)
    model = GPT(config)
    model.initialize(generator=torch.Generator().manual_seed(0))
    return model.to(dtype)


def nll(model: GPT, windows: Tensor) -> float:
    return depth_profile(model, windows, depth=0, full=False).nll[0]


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_without_dropout_and_leaves_the_mode_alone(training: bool) -> None:
    model = GPT(dataclasses.replace(trainable().config, dropout=0.5)).train(training)
    windows = torch.arange(40).view(5, 8) % 11
    assert nll(model, windows) == nll(model, windows)
    fed = Feedback(strength=0.5)
    first, again = (trajectory(model, windows, fed, iterations=3).log_probs for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(*(left_to_right(model, windows, fed) for _ in range(2)))
    assert model.training == training
    assert training != torch.equal(*(model(windows) for _ in range(2)))


def test_a_few_steps_lower_the_loss() -> None:
    model = trainable()
    config = TrainingConfig(
        steps=40, warmup_steps=5, batch_size=8, learning_rate=2e-2, matrix_learning_rate=5e-2
    )
    optimizers = make_optimizers(model, config)
    tokens = torch.arange(400) % 7  # each token is decided by the one before it
    losses = [
        training_step(
            model,
            optimizers,
            batch_at(step, tokens, size=8, length=16, seed=0),
            step=step,
            config=config,
        )[0]
        for step in range(40)
    ]
    assert losses[0] == pytest.approx(math.log(23), abs=0.1)  # a fresh model knows nothing
    assert losses[-1] < 0.3
    assert nll(model, tokens.view(25, 16)) < 0.5


def test_a_step_reports_its_loss_and_uses_the_scheduled_rates() -> None:
    model = trainable(torch.float64)
    config = TrainingConfig(steps=20, warmup_steps=4, learning_rate=1e-3, matrix_learning_rate=1e-2)
    optimizers = make_optimizers(model, config)
    windows = torch.arange(34).view(2, 17) % 23
    expected = F.cross_entropy(
        model.lm_head(model(windows[:, :-1])).flatten(0, 1), windows[:, 1:].flatten()
    ).item()
    (loss,) = training_step(model, optimizers, windows, step=1, config=config)
    assert loss == pytest.approx(expected, rel=ROUNDING)
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.5e-2, 0.5e-3]  # 2 of 4 of warm-up
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_padded_step_is_the_step_without_padding() -> None:
    windows = torch.arange(20).view(2, 10) % 23
    padded = torch.cat([windows, torch.full((2, 5), IGNORE)], dim=1)
    models = []
    for batch in (windows, padded):
        model = trainable(torch.float64)
        config = TrainingConfig(steps=3, warmup_steps=1)
        optimizers = make_optimizers(model, config)
        for step in range(3):
            training_step(model, optimizers, batch, step=step, config=config)
        models.append(model)
    # AdamW divides by the root of its own gradients, so that rounding of tiny ones shows more
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (one - other).abs().max() <= 1e-3
    losses = [nll(model, windows) for model in models]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_repeated_training_is_bit_for_bit_the_same_and_resumable() -> None:
    config = TrainingConfig(steps=8, warmup_steps=2)
    tokens = torch.arange(300) % 13

    def steps(model: GPT, optimizers: list, numbers: range) -> None:
        for step in numbers:
            windows = batch_at(step, tokens, size=4, length=16, seed=1)
            training_step(model, optimizers, windows, step=step, config=config)

    straight = trainable()
    steps(straight, make_optimizers(straight, config), range(8))

    half = trainable()
    first = make_optimizers(half, config)
    steps(half, first, range(4))
    resumed = trainable()
    resumed.load_state_dict(half.state_dict())
    second = make_optimizers(resumed, config)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    steps(resumed, second, range(4, 8))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_half_precision_training_follows_full_precision() -> None:
    tokens = torch.arange(400) % 7
    losses = {}
    for autocast in (False, True):
        model = trainable()
        config = TrainingConfig(steps=20, warmup_steps=5, learning_rate=2e-2, autocast=autocast)
        optimizers = make_optimizers(model, config)
        losses[autocast] = [
            training_step(
                model,
                optimizers,
                batch_at(step, tokens, size=8, length=16, seed=0),
                step=step,
                config=config,
            )[0]
            for step in range(20)
        ]
    # bfloat16 has 8 bits: 0.4 % of logits that are below 1 at first
    assert losses[True][0] == pytest.approx(losses[False][0], abs=0.02)
    assert losses[True][-1] < 0.5 * losses[True][0]
