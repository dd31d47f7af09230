"""Trajectories that come back to where they were, and so will never settle.

Shapes: R rows, T positions, P passes.
"""

from collections import deque

import torch
from torch import Tensor

LONGEST_CYCLE = 8  # periods that are looked for


class CycleDetector:
    """Finds a trajectory that comes back to where it was 2 ... LONGEST_CYCLE passes ago.

    A return counts when every position is back to within a few roundings while the last step was
    far larger, and when that held for one whole period.
    """

    def __init__(self, rows: int) -> None:
        self.past: deque[Tensor] = deque(maxlen=LONGEST_CYCLE)  # (R, T) each
        self.returns = [[0] * (LONGEST_CYCLE + 1) for _ in range(rows)]

    def keep(self, kept: list[int], length: int) -> None:
        """Go on with some of the rows and positions."""
        self.past = deque((values[kept, :length] for values in self.past), maxlen=LONGEST_CYCLE)
        self.returns = [self.returns[i] for i in kept]

    def see(self, log_probs: Tensor) -> list[bool]:
        """Whether each row cycles, given its (R, T) log-probabilities, zeros in the padding."""
        found = [False] * len(self.returns)
        if len(self.past) >= 2:
            past = torch.stack(list(self.past)[::-1])  # (P, R, T), newest first
            distances = (past - log_probs).abs().amax(dim=2)  # (P, R)
            scale = log_probs.abs().amax(dim=1).clamp_min(1.0)
            close = 64 * torch.finfo(log_probs.dtype).eps * scale
            moved = distances[0] > 100 * close
            back = ((distances <= close) & moved).T.tolist()  # (R, P)
            for row, returned in enumerate(back):
                counts = self.returns[row]
                for period in range(2, len(returned) + 1):
                    counts[period] = counts[period] + 1 if returned[period - 1] else 0
                    found[row] |= counts[period] >= period
        self.past.append(log_probs)
        return found
