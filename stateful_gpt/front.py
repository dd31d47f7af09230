"""What tells how far a row of a recompute has come: the front of what is final, and cycles.

The *front* of a row is how many of its leading positions are final. Of the positions behind it, the
first that a pass moves is final then, and so is all before: a triangular pass says of a position
what the ones before it are, and those have not moved. So every pass moves the front on by one at
least, and a row whose front has passed its end is at rest.

Shapes: R rows that take part in a pass, T positions, N positions that it says, P passes.
"""

from collections import deque
from typing import Literal

import torch
from torch import Tensor

# Moving by this many roundings is none: the same sums in matrices of another shape differ by it.
ROUNDINGS = 16
NARROWEST = 16  # positions that a window of width ``auto`` has at least
LONGEST_CYCLE = 8  # periods that are looked for


class Fronts:
    """The fronts of all rows of a batch.

    Attributes:
        reach: leading positions of each row that are final; length + 1 once its output is, too.
        whole: whether every pass says all positions anew, final or not.
        rough: whether some position of a row counts as final by the tolerance alone.
    """

    def __init__(
        self,
        lengths: list[int],
        known: list[int],
        *,
        window: int | Literal["all", "auto"] | None,
        whole: bool,
    ) -> None:
        self.lengths, self.reach, self.whole = lengths, known, whole
        self.rough = [False] * len(known)
        self._window = window
        self._widths = [2 * NARROWEST] * len(known)
        self._ends = list(lengths)

    def range(self, rows: list[int], *, to_the_end: bool) -> tuple[int, int]:
        """(begin, end) of what a pass over these rows evaluates; empty where all is final."""
        for row in rows:
            width = self._widths[row] if self._window == "auto" else self._window
            self._ends[row] = self.lengths[row]
            if isinstance(width, int) and not to_the_end:
                self._ends[row] = min(self.lengths[row], self.reach[row] - 1 + width)
        moving = [row for row in rows if self.reach[row] <= self.lengths[row]]
        begin = min((self.reach[row] - 1 for row in moving), default=0)
        return begin, max((self._ends[row] for row in moving), default=0)

    def taken(self, row: int) -> tuple[int, int]:
        """The positions that a row takes over: it sees no further than it would alone."""
        begin = 0 if self.whole else self.reach[row]
        return begin, min(self._ends[row] + 1, self.lengths[row])

    def advance(self, row: int, begin: int, exactly: int, roughly: int) -> None:
        """Move a row's front behind the first position that a pass has moved.

        Args:
            begin: the first position of what the pass said.
            exactly, roughly: how many positions from there on have not moved, at all or by more
                than the tolerance.
        """
        if self.reach[row] > self.lengths[row]:
            return
        end = self._ends[row]

        def reach(still: int) -> int:
            inside = begin + still < min(end + 1, self.lengths[row])
            return begin + still + 1 if inside else end + 1

        before, self.reach[row] = self.reach[row], reach(roughly)
        self.rough[row] |= reach(exactly) != self.reach[row]
        self._widths[row] = max(NARROWEST, 2 * (self.reach[row] - before))


def roundings(said: Tensor, fed: Tensor) -> Tensor:
    """(R, N) how far (R, N, ...) said is from fed, in roundings of a value of its size, of 1 at
    least.
    """
    steps = (said - fed).abs() / (said.abs().clamp_min(1.0) * torch.finfo(said.dtype).eps)
    return steps if steps.ndim == 2 else steps.flatten(2).amax(dim=2)


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
