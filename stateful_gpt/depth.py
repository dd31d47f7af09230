"""How well a model with hidden-state feedback predicts, by the depth of its recurrence.

Depth n means n passes fed with hidden states after one without: depth 0 is the plain model, and
T - 1 is what a text of T tokens is generated at.

Shapes: N windows, T tokens that are read of each, C n_embd.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stateful_gpt.feedback import HIDDEN_STATE, Feedback, shift_right
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT
from stateful_gpt.oracle import LeftToRight
from stateful_gpt.scoring import mean_kl, score_targets
from stateful_gpt.train import IGNORE

# Of float32 distributions that are equal but for rounding, the computed KL is below this (nats).
KL_FLOOR = 1e-8

HIDDEN_STATES = Feedback.of_kind(HIDDEN_STATE, 1.0)


@dataclass(frozen=True)
class DepthProfile:
    """Cross-entropy and movement by depth, on the same text (nats; means over predictions)."""

    nll: list[float]  # at depth 0, 1, ...
    kl: list[float]  # kl[n] is KL(depth n || depth n + 1) of the next-token distributions
    nll_full: float | None  # at depth T - 1, where generation happens; None if not asked for
    tokens: int  # how many predictions each mean is over

    @property
    def broken_at(self) -> int | None:
        """The first n >= 1 at which KL(n || n + 1) < KL(n - 1 || n) fails; None if it never does.

        This is the stability condition that "Stateful GPT" was proposed with. Where both are
        rounding, it holds.
        """
        falls = [after < before or after <= KL_FLOOR for before, after in pairwise(self.kl)]
        return falls.index(False) + 1 if False in falls else None  # nan does not fall


@torch.no_grad()
def depth_profile(
    model: GPT, windows: Tensor, *, depth: int, full: bool, batch_size: int = 32
) -> DepthProfile:
    """Read (N, T + 1) ids, IGNORE being padding on the right, at depths 0 ... ``depth``.

    That must be 0 of a model without a gate. ``full``: at depth T - 1 as well, left to right.
    """
    nll = torch.zeros(depth + 1, dtype=torch.float64)
    kl = torch.zeros(depth, dtype=torch.float64)
    nll_full, tokens = 0.0, 0
    for batch in windows.split(batch_size):
        batch = batch.to(model.device)
        inputs, targets = batch[:, :-1].clamp_min(0), batch[:, 1:]
        counted = targets != IGNORE
        tokens += int(counted.sum())
        wanted = targets[counted]
        before: Tensor | None = None
        for n in range(depth + 1):
            fed = None if before is None else shift_right(before)
            hidden = model.read(inputs, modulation=Modulation(hidden=fed))
            now = hidden[counted]
            nll[n] -= score_targets(model, now, wanted).log_probs.double().sum().item()
            if before is not None:
                kl[n - 1] += mean_kl(model, before[counted], now) * len(wanted)
            before = hidden
        if full:
            reader = LeftToRight(model, HIDDEN_STATES, batch=len(batch), capacity=inputs.size(1))
            log_probs = reader.read(inputs)[:, 1:]
            last = reader.score_next(targets[:, -1].clamp_min(0))
            log_probs = torch.cat([log_probs, last[:, None]], dim=1)
            nll_full -= log_probs[counted].double().sum().item()
    return DepthProfile(
        nll=(nll / tokens).tolist(),
        kl=(kl / tokens).tolist(),
        nll_full=nll_full / tokens if full else None,
        tokens=tokens,
    )
