"""The whole trajectory of given texts in one call: what every pass says of every token.

Shapes: N passes, B texts, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stateful_gpt.feedback import Feedback
from stateful_gpt.model import GPT
from stateful_gpt.recompute import Iteration, Outcome, RecomputeConfig, recompute
from stateful_gpt.solving import token_pass


@dataclass(frozen=True)
class Trajectory:
    """Estimates by pass, and how they ended.

    Attributes:
        log_probs: (N, B, T) nats on the CPU; pass 0 is the plain model. Position 0, which nothing
            predicts, has 0.
        outcomes: one a text.
    """

    log_probs: Tensor
    outcomes: list[Outcome]


@torch.no_grad()
def trajectory(
    model: GPT,
    tokens: Tensor | Sequence[int],
    feedback: Feedback,
    *,
    iterations: int = 64,
    tolerance: float = 0.0,
    damping: float = 1.0,
) -> Trajectory:
    """Feed the estimates of (B, T) or (T,) ids back for ``iterations`` passes.

    Args:
        tolerance: stop once no estimate of any text moves by more than this (nats); 0 runs all
            the passes.
        damping: the part of a pass that the next one is fed.

    Raises:
        ValueError: no token, or more than the model's block holds.
    """
    device = next(model.parameters()).device
    batch = torch.as_tensor(tokens, dtype=torch.long, device=device)
    batch = batch[None] if batch.ndim == 1 else batch
    if batch.ndim != 2 or batch.numel() == 0:
        raise ValueError(f"tokens must be (B, T) or (T,) ids, got the shape {tuple(batch.shape)}")
    passes: list[Tensor] = []

    def keep(iteration: Iteration) -> None:
        passes.append(iteration.said.log_probs.cpu())

    result = recompute(
        token_pass(model, batch, feedback),
        config=RecomputeConfig(iterations=iterations, tolerance=tolerance, damping=damping),
        lengths=[batch.size(1)] * batch.size(0),
        triangular=feedback.triangular,
        observe=keep,
    )
    return Trajectory(log_probs=torch.stack(passes), outcomes=result.outcomes)
