"""Training a GPT on a stream of tokens: the step, the schedule, the loss.

Knows nothing of files, Hydra or W&B: ``experiments.train`` gives it data and keeps its state.

Shapes: B batch, T tokens, C n_embd, V vocabulary, N tokens of a corpus.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stateful_gpt.feedback import shift_right
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT
from stateful_gpt.scoring import wide

IGNORE = -100  # targets that do not count: padding


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Both learning rates follow one schedule: a linear warm-up, then a cosine from the peak to
    ``final_fraction`` of it.

    A model with a gate is trained in ``passes`` parallel passes over each batch: the first without
    feedback, each further one fed the hidden states of the one before, each with a cross-entropy
    of its own, whose mean is the loss. The recurrence over tokens is never unrolled (the
    technique of "Stateful GPT"; the Context-Ready Transformer, arXiv 2606.27538, propagates back
    through the passes).
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 4e-3  # AdamW's, for embeddings, norms and biases
    matrix_learning_rate: float = 2e-2  # Muon's (Jordan et al. 2024), for matrices of the blocks
    final_fraction: float = 0.0
    warmup_steps: int = 50
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    autocast: bool = False
    passes: int = 1
    draw_passes: bool = False  # from 1 to ``passes``, for each batch
    # propagate back into the pass that made the hidden states; else a pass takes them as given
    through_passes: bool = False
    update_every_pass: bool = False  # an optimizer step after each pass, not one for the batch

    def __post_init__(self) -> None:
        if self.through_passes and self.update_every_pass:
            raise ValueError(
                "a gradient cannot pass through hidden states of weights that have been updated:"
                " choose through_passes or update_every_pass"
            )


def next_token_loss(model: GPT, hidden: Tensor, targets: Tensor, *, chunk: int = 512) -> Tensor:
    """Mean cross-entropy in nats of (B, T) targets given (B, T, C) hidden states.

    IGNORE does not count. Logits are made and scored ``chunk`` positions at a time, which is what
    keeps them in the processor's cache.
    """
    weight = model.lm_head.weight.to(hidden.dtype)
    total = torch.zeros((), device=hidden.device)
    chunks = (hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk))
    for h, t in zip(*chunks, strict=True):
        logits = (h @ weight.mT).to(wide(hidden.dtype))  # (chunk, V)
        total = total + F.cross_entropy(logits, t, reduction="sum", ignore_index=IGNORE)
    return total / (targets != IGNORE).sum()


def schedule(step: int, config: TrainingConfig) -> float:
    """The fraction of the peak learning rate used at ``step``, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    wave = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return config.final_fraction + (1.0 - config.final_fraction) * wave


def make_optimizers(model: GPT, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and the gate, AdamW for everything else."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        in_block = name.startswith(("transformer.h.", "gate.")) and parameter.ndim == 2
        (matrices if in_block else others).append(parameter)
    rate, decay = config.matrix_learning_rate, config.weight_decay
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, momentum=0.95),
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def passes_at(step: int, config: TrainingConfig, *, seed: int) -> int:
    """How many passes training step ``step`` makes: a function of seed and step alone."""
    if not config.draw_passes:
        return config.passes
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return int(torch.randint(1, config.passes + 1, (), generator=generator))


def training_step(
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    windows: Tensor,
    *,
    step: int,
    config: TrainingConfig,
    seed: int = 0,
    targets: Tensor | None = None,
) -> list[float]:
    """Train on (B, T + 1) ids, IGNORE being padding; the loss of each pass in nats per token.

    ``seed`` draws the number of passes, if it is drawn; (B, T) ``targets`` are to be predicted at
    each of (B, T) windows, in place of the tokens that follow.
    """
    factor = schedule(step, config)
    peaks = (config.matrix_learning_rate, config.learning_rate)
    for optimizer, peak in zip(optimizers, peaks, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
    inputs = windows
    if targets is None:
        inputs = windows[:, :-1].clamp_min(0)  # padding is on the right: causality hides it
        targets = windows[:, 1:]
    model.train()
    count = passes_at(step, config, seed=seed)
    losses: list[Tensor] = []
    fed: Tensor | None = None
    for number in range(1, count + 1):
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.autocast):
            hidden = model(inputs, modulation=Modulation(hidden=fed))
        fed = shift_right(hidden if config.through_passes else hidden.detach())
        if config.autocast:
            hidden = hidden.to(torch.bfloat16)
        losses.append(next_token_loss(model, hidden, targets))
        if not config.through_passes:
            (losses[-1] / (1 if config.update_every_pass else count)).backward()
        elif number == count:
            torch.stack(losses).mean().backward()
        if config.update_every_pass or number == count:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    values: list[float] = torch.stack(losses).tolist()
    return values
