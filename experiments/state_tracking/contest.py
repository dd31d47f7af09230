"""Train one contestant on one task, and see how far it can follow the state.

Knows nothing of files, Hydra or W&B.

Shapes: B batch, T positions.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.state_tracking.settings import StateTrackingSettings
from experiments.state_tracking.tasks import (
    Target,
    Task,
    make_task,
    test_batch,
    training_batch,
)
from stateful_gpt.feedback import shift_right
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.train import TrainingConfig, make_optimizers, passes_at, training_step


def compete(
    settings: StateTrackingSettings,
    device: torch.device,
    *,
    tell: Callable[[dict[str, float]], object],
) -> tuple[list[list[float]], list[dict[str, float]], dict[str, float]]:
    """Train and test. ``tell`` hears of every ``training.record_every`` steps.

    Returns:
        ``accuracy[n][k]`` at depth n of the recurrence and level k + 1 (of a plain model, depth 0
        is all there is; the last depth is full recurrence), what was told, and facts for the
        summary: among them the accuracy of always giving the most frequent answer, layers evaluated
        and differentiated in training per window, and the training's seconds of processor time.
    """
    asked, contestant, shared = settings.task, settings.contestant, settings.training
    task = make_task(asked.name, Target(asked.target))
    config = TrainingConfig(
        steps=shared.steps * contestant.times,
        passes=contestant.passes,
        through_passes=contestant.through,
        draw_passes=contestant.drawn,
        **shared.model_dump(exclude={"steps", "record_every"}),
    )
    stateful = contestant.passes > 1
    model = GPT(
        GPTConfig(
            block_size=asked.tested_level,
            vocab_size=task.vocab_size,
            n_layer=contestant.layers,
            n_head=settings.size.n_head,
            n_embd=settings.size.n_embd,
            hidden_feedback=stateful,
        )
    )
    model.initialize(generator=torch.Generator().manual_seed(settings.seed))
    model.to(device)
    optimizers = make_optimizers(model, config)
    history = []
    passes_made = 0
    started = time.process_time()
    for step in range(config.steps):
        tokens, targets = training_batch(
            task,
            step=step,
            size=config.batch_size,
            level=asked.trained_level,
            length=asked.tested_level,
            seed=settings.seed,
        )
        passes = passes_at(step, config, seed=settings.seed)
        losses = training_step(
            model,
            optimizers,
            tokens.to(device),
            step=step,
            config=config,
            passes=passes,
            targets=targets.to(device),
        )
        passes_made += passes
        if (step + 1) % shared.record_every == 0 or step + 1 == config.steps:
            row = {"step": step + 1, "loss_first": losses[0], "loss_last": losses[-1]}
            history.append(row)
            tell(row)
    seconds = time.process_time() - started
    depth = asked.tested_level - 1 if stateful else 0
    accuracy = accuracy_by_depth(model, task, words=settings.test_words, depth=depth)
    facts = {
        "chance": task.chance,
        "parameters": model.count_parameters(),
        "layer_passes": passes_made * contestant.layers,
        "seconds": round(seconds, 2),
    }
    return accuracy, history, facts


@torch.no_grad()
def accuracy_by_depth(model: GPT, task: Task, *, words: int, depth: int) -> list[list[float]]:
    """The share of right answers at depths 0 ... ``depth`` and every level of the block.

    With T positions, depth T - 1 is the fixed point, which reading from left to right has.
    """
    model.eval()
    batch = test_batch(task, size=words, length=model.block_size)
    tokens, targets = (ids.to(model.device) for ids in batch)
    accuracy: list[list[float]] = []
    fed: Tensor | None = None
    for _ in range(depth + 1):
        hidden = model.read(tokens, modulation=Modulation(hidden=fed))
        said = model.logits(hidden).argmax(dim=-1)  # (B, T), of all ids
        accuracy.append((said == targets).double().mean(dim=0).tolist())
        fed = shift_right(hidden)
    return accuracy
