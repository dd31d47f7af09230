"""Train one contestant on one task, and see how far it can follow the state.

Knows nothing of files, Hydra or W&B.

Shapes: B batch, T positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.state_tracking.settings import StateTrackingSettings
from experiments.state_tracking.tasks import Task, word_batch
from stateful_gpt.feedback import shift_right
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.train import TrainingConfig, make_optimizers, passes_at, training_step


def train_contestant(
    settings: StateTrackingSettings,
    task: Task,
    device: torch.device,
    *,
    on_step: Callable[[], object],
) -> tuple[GPT, list[dict[str, float]], int]:
    """The trained model, losses every ``training.record_every`` steps, and the passes made."""
    asked, contestant, recipe = settings.task, settings.contestant, settings.training
    config = TrainingConfig(
        steps=recipe.steps * contestant.times,
        passes=contestant.passes,
        through_passes=contestant.through,
        draw_passes=contestant.drawn,
        **recipe.model_dump(exclude={"steps", "record_every"}),
    )
    architecture = GPTConfig(
        block_size=asked.tested_level,
        vocab_size=task.vocab_size,
        n_layer=contestant.layers,
        n_head=settings.size.n_head,
        n_embd=settings.size.n_embd,
        hidden_feedback=contestant.passes > 1,
    )
    model = GPT(architecture)
    model.initialize(generator=torch.Generator().manual_seed(settings.seed))
    model.to(device)
    optimizers = make_optimizers(model, config)
    history: list[dict[str, float]] = []
    passes_made = 0
    for step in range(config.steps):
        tokens, targets = word_batch(
            task,
            seed=settings.seed * 1_000_003 + step,
            size=config.batch_size,
            level=asked.trained_level,
            length=asked.tested_level,
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
        on_step()
        if (step + 1) % recipe.record_every == 0 or step + 1 == config.steps:
            history.append({"step": step + 1, "loss_first": losses[0], "loss_last": losses[-1]})
    return model, history, passes_made


@torch.no_grad()
def accuracy_by_depth(model: GPT, task: Task, *, words: int, depth: int) -> list[list[float]]:
    """The share of right answers: ``[n][k]`` at depth n up to ``depth``, and level k + 1.

    With T positions, depth T - 1 is the fixed point, which reading from left to right has.
    """
    model.eval()
    level = model.block_size  # words that fill their windows, the same for every contestant
    batch = word_batch(task, seed=2**60, size=words, level=level, length=level)
    tokens, targets = (ids.to(model.device) for ids in batch)
    accuracy: list[list[float]] = []
    fed: Tensor | None = None
    for _ in range(depth + 1):
        hidden = model.read(tokens, modulation=Modulation(hidden=fed))
        said = model.logits(hidden).argmax(dim=-1)  # (B, T), of all ids
        accuracy.append((said == targets).double().mean(dim=0).tolist())
        fed = shift_right(hidden)
    return accuracy
