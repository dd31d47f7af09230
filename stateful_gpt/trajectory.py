"""The whole trajectory of given texts in one call: what every pass says of every token.

Shapes: N passes, B texts, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import Watcher, generate
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.recompute import Iteration, Outcome, RecomputeConfig


@dataclass(frozen=True)
class Trajectory:
    """Estimates by pass, and how they ended."""

    log_probs: Tensor  # (N, B, T) nats on the CPU; pass 0 is the plain model, position 0 has 0
    outcomes: list[Outcome]  # one a text


def trajectory(
    model: LanguageModel,
    tokens: Tensor | Sequence[int],
    feedback: Feedback,
    *,
    iterations: int = 64,
    tolerance: float = 0.0,
    damping: float = 1.0,
) -> Trajectory:
    """Feed the estimates of (B, T) or (T,) ids back for ``iterations`` passes.

    Args:
        tolerance: a text keeps its estimates once none of them moves by more than this (nats; with
            damping, than that part of it), and the passes stop with the last text; 0 runs all.
        damping: the part of a pass that the next one is fed.

    Raises:
        ValueError: no token, or more than the model's block holds.
    """
    batch = torch.as_tensor(tokens)
    batch = batch[None] if batch.ndim == 1 else batch
    if batch.ndim != 2 or batch.numel() == 0 or batch.is_floating_point():
        got = f"{batch.dtype} of the shape {tuple(batch.shape)}"
        raise ValueError(f"tokens must be (B, T) or (T,) ids, got {got}")
    if batch.size(1) > model.block_size:
        raise ValueError(
            f"{batch.size(1)} tokens do not fit the model's block of {model.block_size}"
        )
    passes: list[Tensor] = []

    def keep(iteration: Iteration) -> None:
        passes.append((passes or [iteration.log_probs])[-1].to("cpu", copy=True))
        passes[-1][iteration.span.rows] = iteration.log_probs.cpu()

    result = generate(
        model,
        batch.tolist(),
        max_new_tokens=0,
        feedback=feedback,
        config=RecomputeConfig(iterations=iterations, tolerance=tolerance, damping=damping),
        watch=lambda _: Watcher(keep),
    )
    outcomes = [outcome for (outcome,) in result.outcomes]
    return Trajectory(log_probs=torch.stack(passes), outcomes=outcomes)
