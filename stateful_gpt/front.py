"""What tells how far a row of a recompute has come: the front of what is final, and cycles.

The *front* of a row is how many of its leading positions are final. Of the positions behind it, the
first that a pass moves is final then, and so is all before: a triangular pass says of a position
what the ones before it are, and those have not moved. So every pass moves the front on by one at
least, and a row whose front has passed its end is at rest.

Shapes: R rows that take part in a pass, T positions, N positions that it says, P passes.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

# Moving by this many roundings is none: the same sums in matrices of another shape differ by it.
ROUNDINGS = 16
NARROWEST = 16  # positions that a window of width ``auto`` has at least
LONGEST_CYCLE = 8  # periods that are looked for


@dataclass
class Row:
    """Where one row of a batch stands."""

    number: int  # in the batch
    length: int
    reach: int  # its front; at length + 1 the output of its last position is final, too
    goal: int  # of the front
    rough: bool = False  # whether some position counts as final by the tolerance alone
    width: int = NARROWEST  # of a window ``auto``
    end: int = 0  # of what a pass evaluates for this row
    passes: int = 0
    running: bool = True

    def look(self, window: int | str | None) -> None:
        """Choose the end of what the next pass evaluates; without a window, the row's own."""
        width = self.width if window == "auto" else window
        ahead = width if isinstance(width, int) else self.length
        self.end = min(self.length, self.reach - 1 + ahead)

    def advance(self, begin: int, exactly: int, roughly: int) -> None:
        """Move the front behind the first position that a pass has moved.

        From ``begin`` on so many positions have not moved, at all or by more than the tolerance.
        """
        if self.reach > self.length:
            return
        # behind its end nothing was evaluated
        before, self.reach = self.reach, min(begin + roughly, self.end) + 1
        self.rough |= min(begin + exactly, self.end) + 1 != self.reach
        self.width = max(NARROWEST, 2 * (self.reach - before))


def roundings(said: Tensor, fed: Tensor) -> Tensor:
    """(R, N) how far (R, N, ...) values moved, in roundings of a value of that size, at least 1."""
    return largest((said - fed).abs() / (said.abs().clamp_min(1.0) * torch.finfo(said.dtype).eps))


def largest(values: Tensor) -> Tensor:
    """(R, N) the largest of the (R, N, ...) values of each position."""
    return values if values.ndim == 2 else values.flatten(2).amax(dim=2)


class CycleDetector:
    """Finds a trajectory that comes back to where it was 2 ... LONGEST_CYCLE passes ago.

    A return counts when every position is back to within a few roundings while the last step was
    far larger, and when that held for one whole period.
    """

    def __init__(self, rows: int) -> None:
        self.past: deque[Tensor] = deque(maxlen=LONGEST_CYCLE)  # (R, T, ...) each, newest first
        self.returns = torch.zeros(LONGEST_CYCLE, rows, dtype=torch.long)  # in a row, by period

    def keep(self, kept: list[int], length: int) -> None:
        """Go on with some of the rows and positions."""
        self.past = deque((values[kept, :length] for values in self.past), maxlen=LONGEST_CYCLE)
        self.returns = self.returns[:, kept]

    def see(self, state: Tensor) -> list[bool]:
        """Whether each row cycles, given its (R, T, ...) state, zeros in the padding."""
        known = len(self.past)
        if known >= 2:
            distances = (torch.stack([*self.past]) - state).abs().flatten(2).amax(dim=2)  # (P, R)
            scale = state.abs().flatten(1).amax(dim=1).clamp_min(1.0)
            close = 64 * torch.finfo(state.dtype).eps * scale
            back = (distances <= close) & (distances[0] > 100 * close)
            self.returns[:known] = (self.returns[:known] + 1) * back.cpu()
        self.past.appendleft(state)
        periods = torch.arange(1, LONGEST_CYCLE + 1)[:, None]
        found: list[bool] = (self.returns >= periods)[1:].any(dim=0).tolist()
        return found
