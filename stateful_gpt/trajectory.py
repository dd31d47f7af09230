"""The whole trajectory of given texts in one call: what every pass says of every token.

Shapes: N passes, B texts, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stateful_gpt.feedback import Feedback
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.passes import Passes
from stateful_gpt.recompute import Iteration, Outcome, RecomputeConfig, recompute


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
        tolerance: stop once no estimate of any text moves by more than this (nats); 0 runs all
            the passes.
        damping: the part of a pass that the next one is fed.

    Raises:
        ValueError: no token, or more than the model's block holds.
    """
    batch = torch.as_tensor(tokens, dtype=torch.long, device=model.device)
    batch = batch[None] if batch.ndim == 1 else batch
    if batch.ndim != 2 or batch.numel() == 0:
        raise ValueError(f"tokens must be (B, T) or (T,) ids, got the shape {tuple(batch.shape)}")
    passes: list[Tensor] = []

    def keep(iteration: Iteration) -> None:
        passes.append(iteration.log_probs.cpu())

    count, length = batch.shape
    run_pass = Passes(model, feedback, batch=count, capacity=length, cached=False)
    run_pass.window(batch)
    result = recompute(
        run_pass,
        config=RecomputeConfig(iterations=iterations, tolerance=tolerance, damping=damping),
        lengths=[length] * count,
        triangular=feedback.triangular,
        leave=False,
        observe=keep,
    )
    return Trajectory(log_probs=torch.stack(passes), outcomes=result.outcomes)
