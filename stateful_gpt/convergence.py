"""Numbers of a trajectory: how far its estimates are from where they end, and how fast they go.

Pure functions of tensors; nothing here runs a model.

Shapes: N passes, T tokens. A trajectory is (N, T) log-probabilities in nats, one row a pass.
"""

import math
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

# Errors above this many times where they end are still falling: what they end in is a quarter of
# them at most.
FALLING = 4.0


def settled_prefixes(log_probs: Sequence[Tensor], *, tolerance: float) -> list[int]:
    """After each pass, how many leading positions stay within ``tolerance`` of where they end.

    For passes whose fixed point is not known, of (T,) log-probabilities after each of at least two.
    Where a position ends is its value at the last pass, which is no evidence of its own: the last
    pass is given what the one before it has.
    """
    last = log_probs[-1]
    still = torch.ones(len(last), dtype=torch.bool)
    prefixes = []
    for values in reversed(log_probs[:-1]):
        still &= (values - last).abs() <= tolerance
        prefixes.append(len(last) if bool(still.all()) else int((~still).long().argmax()))
    return [*prefixes[::-1], prefixes[0]]


def iterations_to_tolerance(errors: Sequence[float], *, tolerance: float) -> int | None:
    """The first pass from which on all errors stay within ``tolerance`` (nats); None for none."""
    reached: int | None = None
    for number, error in enumerate(errors, start=1):
        if not error <= tolerance:
            reached = None
        elif reached is None:
            reached = number
    return reached


def contraction_rate(errors: Sequence[float], *, floor: float) -> float | None:
    """The factor by which a pass multiplies the error, fitted while it falls.

    The slope of a least-squares line through the logarithm of the errors (nats), exponentiated;
    None with fewer than three errors to fit. The fit ends at errors of ``floor`` (rounding level),
    or within FALLING times their last value: below lies the plateau that rounding leaves them on,
    so that passes at rest change nothing. Errors that never were so far above their last value are
    fitted down to it. A factor near 1 with an error that ends abruptly is the mark of a front that
    walks through the text.
    """
    finite = list(takewhile(math.isfinite, errors))
    while len(finite) > 1 and finite[-1] == finite[-2]:
        finite.pop()  # at rest
    if finite and finite[0] > FALLING * finite[-1]:
        floor = max(floor, FALLING * finite[-1])
    logs = [math.log(error) for error in takewhile(lambda error: error > floor, finite)]
    if len(logs) < 3:
        return None
    return math.exp(slope(torch.tensor(logs, dtype=torch.float64)))


def slope(y: Tensor) -> float:
    """Of the least-squares line through (N,) values at 0, 1, 2 ..."""
    x = torch.arange(len(y), dtype=torch.float64)
    x = x - x.mean()
    return ((x * (y - y.mean())).sum() / (x * x).sum()).item()


def rounding_floor(log_probs: Tensor) -> float:
    """Differences of log-probabilities below this are rounding, given their dtype (nats)."""
    return 32 * torch.finfo(log_probs.dtype).eps * max(1.0, log_probs.abs().max().item())
