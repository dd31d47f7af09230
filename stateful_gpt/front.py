"""How far each row of a triangular recompute is final, and which positions a pass still evaluates.

The *front* of a row is how many of its leading positions are final. Of the positions behind it, the
first that a pass moves is final then, and so is all before: a triangular pass says of a position
what the ones before it are, and those have not moved. So every pass moves the front on by one at
least, and a row whose front has passed its end is at rest.

Shapes: R rows that take part in a pass, T positions, N positions that the pass says.
"""

from typing import Literal

import torch
from torch import Tensor

# Moving by this many roundings is none: the same sums in matrices of another shape differ by it.
ROUNDINGS = 16
NARROWEST = 16  # positions that a window of width ``auto`` has at least


class Fronts:
    """The fronts of all rows of a batch.

    Attributes:
        reach: leading positions of each row that are final; length + 1 once its output is, too.
        rough: whether some position of a row counts as final by the tolerance alone.
    """

    def __init__(
        self,
        lengths: list[int],
        known: list[int],
        *,
        window: int | Literal["all", "auto"] | None,
        tolerance: float,
        inert: bool,
    ) -> None:
        """``tolerance``: a step in nats that counts as none; 0 for rounding alone."""
        self.lengths, self.reach = lengths, list(known)
        self.rough = [False] * len(known)
        self._window, self._tolerance, self._inert = window, tolerance, inert
        self._widths = [2 * NARROWEST] * len(known)
        self._ends = list(lengths)

    def range(self, rows: list[int], *, to_the_end: bool) -> tuple[int, int]:
        """(begin, end) of what a pass over these rows evaluates; empty where all is final."""
        moving = [row for row in rows if self.reach[row] <= self.lengths[row]]
        for row in rows:
            width = self._widths[row] if self._window == "auto" else self._window
            end = self._ends[row] = self.lengths[row]
            if isinstance(width, int) and not to_the_end:
                self._ends[row] = min(end, self.reach[row] - 1 + width)
        begin = min((self.reach[row] - 1 for row in moving), default=0)
        return begin, max((self._ends[row] for row in moving), default=0)

    def merge(
        self,
        rows: list[int],
        going: list[bool],
        begin: int,
        old: tuple[Tensor, Tensor],
        said: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a pass has changed.

        Args:
            going: whether each of these rows still takes part; the others stay as they are.
            begin: the first of the N positions.
            old, said: state (R, N, ...) and log-probabilities (R, N, nats) as fed and as said.

        Returns:
            the new state, the new log-probabilities, and (2, R) how many of the N positions lead up
            to the first that has moved, at all and by more than the tolerance: for ``advance``.
        """
        end, device = begin + said[1].size(1), said[1].device
        at = torch.arange(begin, end, device=device)
        low = [self.reach[r] if g else end for r, g in zip(rows, going, strict=True)]
        high = [min(self._ends[r] + 1, self.lengths[r]) for r in rows]
        # no row sees further than it would alone
        new = at >= torch.tensor(low, device=device)[:, None]  # (R, N)
        new &= at < torch.tensor(high, device=device)[:, None]
        exactly = roundings(said[0], old[0]) <= ROUNDINGS
        exactly = (exactly.flatten(2).all(dim=2) if exactly.ndim > 2 else exactly) | ~new
        roughly = exactly
        if self._tolerance > 0:
            roughly = exactly | ((said[1] - old[1]).abs() <= self._tolerance)
        still = torch.stack([exactly, roughly]).long().cumprod(dim=2).sum(dim=2)  # (2, R)
        log_probs = torch.where(new, said[1], old[1])  # those of a start may not be known
        if not self._inert:
            # what is final keeps the value that its cached keys were computed with
            new &= at >= begin + still[1][:, None]
        return choose(new, said[0], old[0]), log_probs, still

    def advance(self, row: int, begin: int, exactly: int, roughly: int) -> None:
        """Move a row's front behind the first position that a pass has moved."""
        if self.reach[row] > self.lengths[row]:
            return
        end = self._ends[row]

        def reach(still: int) -> int:
            inside = begin + still < min(end + 1, self.lengths[row]) and not self._inert
            return begin + still + 1 if inside else end + 1

        before, self.reach[row] = self.reach[row], reach(roughly)
        self.rough[row] |= reach(exactly) != self.reach[row]
        self._widths[row] = max(NARROWEST, 2 * (self.reach[row] - before))


def choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """(R, N, ...) values where a mask (R, N) is True, other ones elsewhere."""
    return torch.where(mask.view(*mask.shape, *[1] * (yes.ndim - 2)), yes, no)


def roundings(said: Tensor, fed: Tensor) -> Tensor:
    """How far said is from fed, in roundings of a value of its size, of 1 at least."""
    return (said - fed).abs() / (said.abs().clamp_min(1.0) * torch.finfo(said.dtype).eps)
