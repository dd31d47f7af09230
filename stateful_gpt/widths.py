"""How many positions a pass should evaluate: as many as settle for what they cost.

A pass over many positions costs less for each, but does not settle most of them. Which width is
best depends on how fast estimates settle, and that shows only while they do. Costs are those of a
model of the hardware, not measured while running: the same text takes the same passes on every
run.

Knows nothing of GPT or of estimates.
"""

import math
from dataclasses import dataclass

PATIENCE = 48  # positions read one at a time that wide passes may cost in vain
FIRST_REST = 256  # positions read one at a time before wide passes are tried again
FEWEST_PASSES = 8  # that a text is expected to take however short it is
WIDEST = 16  # times the first width
WIDEN, NARROW = 1 / 8, 1 / 24  # of a window, settled by a pass


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

    @property
    def width(self) -> int:
        """Where to begin: the power of two at which most of a pass's cost is its positions'."""
        return max(8, 1 << round(math.log2(1.5 * self.fixed)))

    def short(self, positions: int) -> bool:
        """Whether so few positions are read sooner one at a time than by wide passes."""
        return positions * self.one <= FEWEST_PASSES * self.of(positions)


@dataclass(frozen=True)
class Hardware:
    """Round numbers of a kind of machine.

    Attributes:
        launch, launch_one: seconds a layer takes at least, of a wide pass and of one position.
        bandwidth: bytes a second at which weights are read.
        rate: floating-point operations a second of matrix products.
    """

    launch: float
    launch_one: float
    bandwidth: float
    rate: float

    def costs(self, *, layers: int, parameters: int, bytes_each: int) -> Costs:
        """Of passes of a model: each reads all weights once, two operations a position on each."""
        read = parameters * bytes_each / self.bandwidth
        position = 2 * parameters / self.rate
        return Costs(
            one=(layers * self.launch_one + read) / position,
            fixed=(layers * self.launch + read) / position,
        )


# two cores of a server, by scripts.benchmark; the GPU's are from data sheets, and not measured
CPU = Hardware(launch=2e-4, launch_one=1e-4, bandwidth=25e9, rate=150e9)
GPU = Hardware(launch=1e-4, launch_one=1e-4, bandwidth=2e12, rate=100e12)


class Width:
    """The width of the next pass over one text.

    Wide passes go on as long as they have not cost much more than reading the same positions one
    at a time would have. So no text costs much more than that, and a slow beginning is forgiven.

    Attributes:
        now: positions that the next pass evaluates from the front on.
    """

    def __init__(self, start: int, costs: Costs | None = None, *, length: int = 0) -> None:
        """Begin with ``start``; without costs, stay there.

        ``length``: positions that are to be read, where that is known.
        """
        self._start, self._costs = start, costs
        self.now = 1 if length and costs is not None and costs.short(length) else start
        self._passes, self._gained, self._excess = 0, 0, 0.0
        self._rest = FIRST_REST

    def settled(self, positions: int) -> None:
        """Say by how many positions the front got on in a pass of this width."""
        if self._costs is None:
            return
        self._passes += 1
        self._gained += positions
        if self.now == 1:
            if self._passes >= self._rest:
                self._rest *= 2
                self._begin(self._start)
            return
        # while it is negative, there is nothing to make up for
        self._excess += self._costs.of(self.now) - positions * self._costs.one
        self._excess = max(0.0, self._excess)
        if self._excess > PATIENCE * self._costs.one:
            self._excess = 0.0
            self._begin(1 if self.now <= self._start else self._start)
        elif self._gained >= self.now:
            rate = self._gained / self._passes
            if rate >= WIDEN * self.now:
                self._begin(min(2 * self.now, WIDEST * self._start))
            elif rate < NARROW * self.now:
                self._begin(max(self.now // 2, self._start))
            else:
                self._begin(self.now)

    def _begin(self, width: int) -> None:
        self.now, self._passes, self._gained = width, 0, 0
