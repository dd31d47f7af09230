"""How many positions a pass should evaluate: the width that settles the most for its cost.

A pass over many positions at once is cheaper for each, but does not settle most of them. Which
width is best depends on how fast estimates settle, and that is only known by trying. Costs are
those of a model of the hardware, not measured while running: the same text takes the same passes
on every run.

Knows nothing of GPT or of estimates.
"""

from dataclasses import dataclass

import torch

CANDIDATES = (32, 64, 128, 256)  # besides one position at a time
ROUND = 3  # passes of one width before it is judged: the first ones over new positions settle few
FIRST_REST = 128  # positions read one at a time before wider passes are tried again


@dataclass(frozen=True)
class Costs:
    """What passes cost, in the cost that one more position adds to a wide pass.

    Attributes:
        one: of a pass over one position.
        fixed: of a wide pass, whatever its width.
    """

    one: float
    fixed: float

    def of(self, width: int) -> float:
        return self.one if width == 1 else self.fixed + width


def costs_on(device: torch.device) -> Costs:
    """Round ratios of the times of passes.

    On a CPU a position alone is limited by reading the weights, and products with few rows are
    slow: with the bundled model on two cores one position takes as long as 9 further ones of a wide
    pass when nothing else runs, as 20 when other programs keep the weights out of the caches. On a
    GPU any pass of less than some hundred positions takes as long as its launches.
    """
    return Costs(one=12, fixed=30) if device.type == "cpu" else Costs(one=256, fixed=256)


class Width:
    """The width of the next pass over one text.

    Attributes:
        now: positions that the next pass evaluates from the front on.
    """

    def __init__(self, start: int, costs: Costs | None = None) -> None:
        """Begin with ``start``; without costs, stay there."""
        self.now = start
        self._costs = costs
        self._rates: dict[int, float] = {}  # positions settled per cost, of the widths tried
        self._passes, self._gained = 0, 0
        self._rest = FIRST_REST

    def settled(self, positions: int) -> None:
        """Say by how many positions the front got on in a pass of this width."""
        if self._costs is None:
            return
        self._passes += 1
        self._gained += positions
        if self._passes < (ROUND if self.now > 1 else self._rest):
            return
        if self.now == 1:
            self._rest *= 2
            self._rates.clear()
            self._begin(CANDIDATES[0])
            return
        self._rates[self.now] = self._gained / (self._passes * self._costs.of(self.now))
        best = max(self._rates, key=lambda width: self._rates[width])
        if self._rates[best] <= 1 / self._costs.one:
            self._begin(1)
            return
        wider = next((w for w in CANDIDATES if w > best), None)
        # a width that was the best of its neighbours so far may have a better one
        self._begin(wider if wider is not None and wider not in self._rates else best)

    def _begin(self, width: int) -> None:
        self.now, self._passes, self._gained = width, 0, 0
