"""Fixed-point loop over an arbitrary state: estimates in, estimates out, until nothing moves.

Knows nothing of GPT, files or W&B: a pass is any function from a state to what it says.

For a triangular pass (what it says of position j depends only on the state before j) the loop is
a Jacobi iteration that ends: if the first k positions of its start are already right, then k + n
positions are right after n passes (Song et al. 2021, arXiv 2002.03629; Santilli et al. 2023,
arXiv 2305.10427). Position 0 is right from the outset, so T positions need at most T - 1 passes.

Shapes: B batch, T positions.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

LONGEST_CYCLE = 8  # periods that are looked for


class Outcome(Enum):
    """How a recompute ended, from best to worst."""

    SETTLED = "settled"
    WITHIN_TOLERANCE = "within_tolerance"
    ITERATION_LIMIT = "iteration_limit"
    CYCLE = "cycle"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class RecomputeConfig:
    """When the loop stops, and how far each pass moves the state.

    Attributes:
        iterations: the most passes that are run, at least 1.
        tolerance: stop once no log-probability moved by more than this many nats, once the
            estimates are final by the theorem, or once they cycle; 0 runs all the iterations (but
            not those that would evaluate nothing, unless they are observed).
        damping: the next pass is fed (1 - damping) of its predecessor's state and damping of what
            that one said. Below 1 the theorem's bound no longer holds.
    """

    iterations: int = 64
    tolerance: float = 0.0
    damping: float = 1.0


@dataclass(frozen=True)
class Front:
    """How far a pass knows its rows to be settled; lists have one entry a row.

    Attributes:
        settled: leading positions that will not move again; one more than there are once the output
            of the last one is final, too.
        exact: whether that is by the theorem and up to rounding; False where a position also
            counted as settled because it moved by no more than the tolerance.
    """

    settled: list[int]
    exact: list[bool]


@dataclass(frozen=True)
class Moved:
    """What a pass has changed, where it knows that better than by comparing whole texts.

    Attributes:
        step_max, step_rms: as in ``Iteration``.
        finite: per row, whether all it says is.
    """

    step_max: list[float] | None
    step_rms: list[float] | None
    finite: list[bool]


@dataclass(frozen=True)
class Said:
    """What one pass said.

    Attributes:
        state: (B, ...) what the next pass is fed, before damping.
        log_probs: (B, T) nats, by which steps are measured.
        output: (B, ...) whatever else of the pass is wanted from the last one.
        front: of a pass that leaves settled positions alone, or is not through with all the others;
            None of a pass that evaluates every position.
        moved: None where it takes a comparison with the pass before to know.
    """

    state: Tensor
    log_probs: Tensor
    output: Tensor
    front: Front | None = None
    moved: Moved | None = None

    def where(self, rows: Tensor, other: "Said") -> "Said":
        """This one in the rows (B,) that are True, ``other`` in the rest."""

        def choose(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (ours.ndim - 1)), ours, theirs)

        return Said(
            choose(self.state, other.state),
            choose(self.log_probs, other.log_probs),
            choose(self.output, other.output),
            self.front,
            self.moved,
        )


@dataclass(frozen=True)
class Iteration:
    """One pass as an observer sees it.

    Attributes:
        number: counted from 1.
        step_max, step_rms: per row, how far log-probabilities moved since the pass before (nats,
            over its valid positions); None at the first pass.
        running: per row, whether this pass counts: False once the row had ended before it.
    """

    number: int
    said: Said
    step_max: list[float] | None
    step_rms: list[float] | None
    running: list[bool]


@dataclass(frozen=True)
class Recomputed:
    """What the loop ended with; lists have one entry a row.

    Attributes:
        said: of each row's last pass.
        settled: leading positions that are final by the theorem (or as the front of the last pass
            has it), however the row ended; one more than there are when the output of the last one
            is final, too.
    """

    said: Said
    outcomes: list[Outcome]
    iterations: list[int]
    settled: list[int]


Pass = Callable[[Tensor | None], Said]


def recompute(
    run_pass: Pass,
    *,
    config: RecomputeConfig,
    lengths: Sequence[int],
    start: Tensor | None = None,
    settled: Sequence[int] | None = None,
    triangular: bool = True,
    output_too: bool = False,
    observe: Callable[[Iteration], None] | None = None,
) -> Recomputed:
    """Iterate a pass from ``start`` until it ends.

    Args:
        run_pass: maps a state to what it says; None is the cold start, with nothing fed back.
        lengths: valid leading positions of each row; what lies behind them is padding.
        start: (B, ...) the state before the first pass.
        settled: leading positions of each row whose start is already right; default 1.
        triangular: whether the theorem above holds of the pass.
        output_too: whether the output of the last position has to be final as well. It sees that
            position's own estimate, and so takes one pass more than the estimates.
        observe: called after every pass.
    """
    exact = triangular and config.damping == 1.0
    known = list(settled) if settled is not None else [1] * len(lengths)
    final_after: list[float] = [
        max(1, length - k + output_too) if exact else float("inf")
        for length, k in zip(lengths, known, strict=True)
    ]
    outcomes: list[Outcome | None] = [None] * len(lengths)
    passes = [0] * len(lengths)
    running = [True] * len(lengths)
    # the first position to move is final then: a triangular pass cannot come back to where it was
    cycles = None if exact else _CycleDetector(len(lengths))
    valid: Tensor | None = None
    state, previous, last = start, None, None
    for number in range(1, config.iterations + 1):
        said = run_pass(state)
        if valid is None:
            positions = torch.arange(said.log_probs.size(1), device=said.log_probs.device)
            counts = torch.tensor(lengths, device=positions.device)
            valid = positions < counts[:, None]  # (B, T)
        if min(lengths) < valid.size(1):
            # an overflow in what is fed back of padding would reach real positions as 0 * inf
            said = replace(said, state=_without_padding(said.state, valid, fill=0.0))
        if said.moved is None:
            fed = state if said.front is None else None
            step_max, step_rms, residual, finite = _measure(said, previous, fed, valid)
        else:
            step_max, step_rms, residual = said.moved.step_max, said.moved.step_rms, None
            finite = said.moved.finite
        cycling = cycles.see(said.log_probs, valid) if cycles is not None else None
        was_running = list(running)
        for row in range(len(lengths)):
            if not running[row]:
                continue
            passes[row] = number
            bound = number >= final_after[row]
            if said.front is None:
                settled_now = bound or (residual is not None and residual[row] == 0.0)
                within = step_max is not None and step_max[row] <= config.tolerance
            else:
                front = said.front.settled[row]
                reached = front > lengths[row] or (bound and front >= lengths[row] + output_too)
                settled_now, within = reached and said.front.exact[row], reached
                known[row] = front
            outcomes[row] = _outcome(
                finite=finite[row],
                settled=settled_now,
                within=within and config.tolerance > 0,
                cycling=cycling is not None and cycling[row],
            )
            stops = config.tolerance > 0 and outcomes[row] is not Outcome.ITERATION_LIMIT
            if outcomes[row] is Outcome.DIVERGED or stops:
                running[row] = False
        if last is None or all(was_running):
            last = said
        else:
            rows = torch.tensor(was_running, device=said.log_probs.device)
            last = said.where(rows, last)
        if observe is not None:
            observe(Iteration(number, said, step_max, step_rms, was_running))
        # passes that leave alone all that is settled are run only for somebody who watches
        idle = said.front is not None and observe is None
        if not any(
            going_on and not (idle and outcome is Outcome.SETTLED)
            for going_on, outcome in zip(running, outcomes, strict=True)
        ):
            break
        if state is None or config.damping == 1.0:
            state = said.state if config.damping == 1.0 else config.damping * said.state
        else:
            state = (1.0 - config.damping) * state + config.damping * said.state
        previous = said
    assert last is not None
    return Recomputed(
        said=last,
        outcomes=[outcome or Outcome.ITERATION_LIMIT for outcome in outcomes],
        iterations=passes,
        settled=[
            _settled(length + output_too, k, n, outcome=outcome, exact=exact)
            if last.front is None
            else min(length + output_too, k)
            for length, k, n, outcome in zip(lengths, known, passes, outcomes, strict=True)
        ],
    )


def _settled(most: int, known: int, passes: int, *, outcome: Outcome | None, exact: bool) -> int:
    if outcome is Outcome.SETTLED:
        return most
    return min(most, known + passes) if exact else min(1, known)


def _outcome(*, finite: bool, settled: bool, within: bool, cycling: bool) -> Outcome:
    if not finite:
        return Outcome.DIVERGED
    if settled:
        return Outcome.SETTLED
    if within:
        return Outcome.WITHIN_TOLERANCE
    return Outcome.CYCLE if cycling else Outcome.ITERATION_LIMIT


def _measure(
    said: Said, previous: Said | None, state: Tensor | None, valid: Tensor
) -> tuple[list[float] | None, list[float] | None, list[float] | None, list[bool]]:
    """Per row: largest and rms step, largest distance of said from fed state, all finite."""
    finite = (
        _without_padding(said.state.isfinite(), valid, fill=True).flatten(1).all(dim=1).double()
    )
    columns = [finite]
    if previous is not None:
        step = (said.log_probs - previous.log_probs).abs().masked_fill(~valid, 0.0)
        columns.append(step.amax(dim=1).double())
        columns.append((step.double().square().sum(dim=1) / valid.sum(dim=1)).sqrt())
    if state is not None:
        residual = _without_padding((said.state - state).abs(), valid, fill=0.0).flatten(1)
        columns.append(residual.amax(dim=1).double())
    table = torch.stack(columns).tolist()  # the one wait for the device of an iteration
    finite_rows = [bool(value) for value in table.pop(0)]
    step_max = table.pop(0) if previous is not None else None
    step_rms = table.pop(0) if previous is not None else None
    return step_max, step_rms, table.pop(0) if state is not None else None, finite_rows


def _without_padding(values: Tensor, valid: Tensor, *, fill: float) -> Tensor:
    """Values (B, T) or (B, T, C) with those behind a row's length replaced."""
    mask = valid if values.ndim == 2 else valid[..., None]
    return values.masked_fill(~mask, fill)


class _CycleDetector:
    """Finds a trajectory that comes back to where it was 2 ... LONGEST_CYCLE passes ago.

    A return counts when every position is back to within a few roundings while the last step was
    far larger, and when that held for one whole period.
    """

    def __init__(self, rows: int) -> None:
        self.past: deque[Tensor] = deque(maxlen=LONGEST_CYCLE)
        self.returns = [[0] * (LONGEST_CYCLE + 1) for _ in range(rows)]

    def see(self, log_probs: Tensor, valid: Tensor) -> list[bool]:
        values = log_probs.masked_fill(~valid, 0.0)
        found = [False] * len(self.returns)
        if len(self.past) >= 2:
            past = torch.stack(list(self.past)[::-1])  # (P, B, T), newest first
            distances = (past - values).abs().amax(dim=2)  # (P, B)
            scale = values.abs().amax(dim=1).clamp_min(1.0)
            close = 64 * torch.finfo(values.dtype).eps * scale
            moved = distances[0] > 100 * close
            back = ((distances <= close) & moved).T.tolist()  # (B, P)
            for row, periods in enumerate(back):
                for period in range(2, len(periods) + 1):
                    count = self.returns[row][period] + 1 if periods[period - 1] else 0
                    self.returns[row][period] = count
                    found[row] = found[row] or count >= period
        self.past.append(values)
        return found
