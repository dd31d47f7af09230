"""Fixed-point loop over an arbitrary state: estimates in, estimates out, until nothing moves.

Knows nothing of GPT: a pass is any function from a state to what it says.

For a triangular pass (what it says of position j depends only on the state before j) the loop is
a Jacobi iteration that ends: if the first k positions of its start are already right, then k + n
positions are right after n passes (Song et al. 2021, arXiv 2002.03629; Santilli et al. 2023,
arXiv 2305.10427). Position 0 is right from the outset, so T positions need at most T - 1 passes.
What is final need not be said again: see ``front``.

Shapes: B batch, R rows of it that take part in a pass, T positions, N positions that it says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from stateful_gpt.front import ROUNDINGS, CycleDetector, Row, largest, roundings


class Outcome(Enum):
    """How a recompute ended, from best to worst."""

    SETTLED = "settled"
    WITHIN_TOLERANCE = "within_tolerance"
    ITERATION_LIMIT = "iteration_limit"
    CYCLE = "cycle"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class RecomputeConfig:
    """When the loop stops, how far each pass moves the state, and how much of it."""

    iterations: int = 64  # the most passes that are run, at least 1
    # ``auto`` stops a row at rest (final by the theorem, or moved by no more than ROUNDINGS of each
    # value) and one that cycles. A number above 0 also stops a row of which nothing moved by more:
    # no log-probability in nats, and no part of the state in its own unit (of logits the nat, of
    # hidden states what the last norm makes of order 1); with damping, by more than that part
    # of it. 0 runs all iterations
    tolerance: float | Literal["auto"] = "auto"
    # The next pass is fed (1 - damping) of its predecessor's state and damping of what that one
    # said. Below 1 the theorem's bound no longer holds
    damping: float = 1.0
    # How many positions a pass evaluates from the front on, but the first and the last, which read
    # to the end, as ``all`` does; ``auto`` takes twice as many as the pass before has settled. A
    # tolerance then also settles each position by itself, and rows go on until the output of the
    # last is final, if they may. None reads to the end, and with a tolerance of 0 every pass
    # evaluates every position: the definition, to the letter
    window: int | Literal["all", "auto"] | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        number = isinstance(self.tolerance, int | float)
        if self.tolerance != "auto" and not (number and self.tolerance >= 0.0):  # nor nan
            raise ValueError(f"tolerance must be auto or at least 0, got {self.tolerance!r}")
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f"damping must be above 0 and at most 1, got {self.damping}")
        whole = isinstance(self.window, int) and not isinstance(self.window, bool)
        if self.window not in (None, "all", "auto") and not (whole and int(self.window) >= 1):
            raise ValueError(
                f"window must be all, auto or a whole number of at least 1, got {self.window!r}"
            )
        if self.window is not None and self.damping != 1.0:
            raise ValueError(
                "a windowed recompute is undamped, as damped estimates never are final: damping"
                f" must be 1, got {self.damping}"
            )

    @property
    def allowed_step(self) -> float:
        """The step that counts as none; 0 where only rounding does."""
        # a damped pass goes only this part of the way: a small step alone is no sign of an end
        return 0.0 if self.tolerance == "auto" else self.tolerance * self.damping

    @property
    def skips_what_is_final(self) -> bool:
        """Whether triangular passes are asked only for what is not final."""
        return self.damping == 1.0 and (self.tolerance != 0 or self.window is not None)


@dataclass(frozen=True)
class Span:
    """What a pass is asked for: these positions of these (R,) rows of the batch."""

    rows: list[int]
    begin: int  # what lies before is final
    end: int
    ends: list[int]  # what each row asks for: behind it positions are read for other rows alone


@dataclass(frozen=True)
class Said:
    """What one pass said of N positions."""

    state: Tensor  # (R, N, ...) what the next pass is fed, before damping
    log_probs: Tensor  # (R, N) nats
    begin: int = 0  # the first of these positions


@dataclass(frozen=True)
class Iteration:
    """One pass as an observer sees it.

    Steps are how far log-probabilities moved since the pass before, over the row's own positions.
    """

    number: int  # from 1
    span: Span  # what it evaluated; nothing where all was final
    log_probs: Tensor  # (R, T) nats, of all positions after it
    step_max: Tensor | None  # (R,) nats; None at the first pass
    step_rms: Tensor | None
    ran: list[bool]  # of each row, whether it had not ended before: else it is only read along
    at_rest: int  # rows that are settled after it, of the whole batch: some may have left


@dataclass(frozen=True)
class Recomputed:
    """What the loop ended with; lists have one entry a row."""

    state: Tensor  # (B, T, ...) what another undamped pass would be fed
    log_probs: Tensor  # (B, T) nats
    outcomes: list[Outcome]
    iterations: list[int]
    # leading positions that are final, however the row ended; one more than there are when the
    # output of the last one is final, too
    settled: list[int]


Pass = Callable[[Tensor | None, Span], Said]


def recompute(
    run_pass: Pass,
    *,
    config: RecomputeConfig,
    lengths: Sequence[int],
    start: Tensor | None = None,
    log_probs: Tensor | None = None,
    settled: Sequence[int] | None = None,
    triangular: bool = True,
    inert: bool = False,
    output_too: bool = False,
    leave: bool = True,
    observe: Callable[[Iteration], None] | None = None,
) -> Recomputed:
    """Iterate a pass from ``start`` until every row ends.

    Args:
        run_pass: maps a state to what it says; None is the cold start, with nothing fed back.
        lengths: valid leading positions of each row; what lies behind them is padding.
        start: (B, T, ...) the state before the first pass, and ``log_probs`` (B, T) those that go
            with it (nats; default: zeros).
        settled: leading positions of each row of ``start`` that are already right; default 1.
        triangular: whether the theorem above holds of it.
        inert: whether a pass says the same whatever it is fed.
        output_too: whether the output of the last position has to be final as well. It sees that
            position's own estimate, and so takes one pass more than the estimates.
        leave: whether rows that have ended leave the batch; else they are evaluated on, fed what
            they were fed last, and stay as they are.
        observe: called after every pass.
    """
    known = [1] * len(lengths) if settled is None else settled
    rows = [
        Row(number, length, reach, goal=length + output_too)
        for number, (length, reach) in enumerate(zip(lengths, known, strict=True))
    ]
    loop = _Loop(config, rows, triangular=triangular, inert=inert)
    if start is not None:
        loop.fed = start
        loop.now = (start, start.new_zeros(start.shape[:2]) if log_probs is None else log_probs)
    for number in range(1, config.iterations + 1):
        span = loop.span(to_the_end=number in (1, config.iterations))
        said = run_pass(loop.fed, span) if span.end > span.begin else None
        iteration = loop.take(number, span, said)
        if observe is not None:
            observe(iteration)
        if not any(row.running for row in loop.rows):
            break
        loop.next(leave=leave)
    return loop.result()


class _Loop:
    """Where the loop stands. Tensors hold the rows ``self.rows``, in their order."""

    def __init__(
        self, config: RecomputeConfig, rows: list[Row], *, triangular: bool, inert: bool
    ) -> None:
        self.config, self.inert, self.all, self.rows = config, inert, rows, rows
        self.exact = triangular and config.damping == 1.0
        self.by_front = triangular and config.skips_what_is_final
        # a window may have left out the last position, whose output is measured, too
        self.reads_the_end = self.by_front and config.window is not None
        self.outcomes: dict[int, Outcome] = {}
        # the first position to move is final then: a triangular pass cannot come back
        self.cycles = None if self.exact else CycleDetector(len(rows))
        self.fed: Tensor | None = None  # (R, T, ...)
        self.now: tuple[Tensor, Tensor] | None = None  # what was said of it: (R, T, ...), (R, T)
        self.ended: tuple[Tensor, Tensor] | None = None  # the same of all B rows, once some left

    def span(self, *, to_the_end: bool) -> Span:
        """What the next pass evaluates; an empty range where all is final."""
        for row in self.rows:
            row.look(None if to_the_end or not self.by_front else self.config.window)
        numbers, ends = [row.number for row in self.rows], [row.end for row in self.rows]
        if not self.by_front:
            return Span(numbers, 0, max(ends), ends)
        moving = [row for row in self.rows if row.running and row.reach <= row.length]
        begin = min((row.reach - 1 for row in moving), default=0)
        return Span(numbers, begin, max((row.end for row in moving), default=0), ends)

    def take(self, number: int, span: Span, said: Said | None) -> Iteration:
        """Merge what a pass said, and judge each row."""
        before = self.now
        found, begin, count = [(1, 0, 0)] * len(self.rows), 0, 0
        if said is not None:
            found, begin, count = self._merge(said), said.begin, said.log_probs.size(1)
        assert self.now is not None
        log_probs = self.now[1]
        step_max = step_rms = None
        steps, cycles = [torch.inf] * len(self.rows), [False] * len(self.rows)
        if number > 1 and before is not None:
            step = (log_probs - before[1]).abs()
            counts = torch.tensor([row.length for row in self.rows], device=step.device)
            step_max = step.amax(dim=1)
            step_rms = (step.double().square().sum(dim=1) / counts).sqrt()
            if self.config.allowed_step > 0 and self.config.window is None:
                # log-probabilities do not tell all of logits and hidden states
                moved = largest((self.now[0] - before[0]).abs()).amax(dim=1)
                steps = torch.maximum(step_max, moved).tolist()
        if self.cycles is not None:
            cycles = self.cycles.see(self.now[0])
        for i, row in enumerate(self.rows):
            if not row.running:
                continue
            row.passes = number
            finite, exactly, roughly = found[i]
            if self.by_front:
                row.advance(begin, exactly, roughly)
            elif self.exact:
                row.reach += 1
            outcome = None
            if not finite:
                outcome = Outcome.DIVERGED
            elif self.exact and row.reach >= row.goal:
                outcome = Outcome.WITHIN_TOLERANCE if row.rough else Outcome.SETTLED
            elif not self.by_front and exactly == count and (self.inert or self.fed is not None):
                outcome = Outcome.SETTLED  # no theorem says so, but the pass said what it was fed
            elif steps[i] <= self.config.allowed_step:
                outcome = Outcome.WITHIN_TOLERANCE
            elif cycles[i]:
                outcome = Outcome.CYCLE
            self.outcomes[row.number] = outcome or Outcome.ITERATION_LIMIT
            on = self.config.tolerance == 0 or (self.reads_the_end and row.reach <= row.length)
            row.running = outcome is None or (on and outcome is not Outcome.DIVERGED)
        ran = [row.passes == number for row in self.rows]
        at_rest = [*self.outcomes.values()].count(Outcome.SETTLED)
        return Iteration(number, span, log_probs, step_max, step_rms, ran, at_rest)

    def _merge(self, said: Said) -> list[tuple[int, int, int]]:
        """Take over of the N positions that a pass said those behind each row's front.

        Returns:
            of each row, whether it is finite, and how many of the N positions lead up to the first
            that has moved, at all and by more than the tolerance.
        """
        begin, end, device = said.begin, said.begin + said.log_probs.size(1), said.log_probs.device
        if self.now is None:  # a cold start says everything
            self.now = (torch.zeros_like(said.state), torch.zeros_like(said.log_probs))
        if begin == end:  # the output of a last token alone, of which no estimate is made
            finite = self.now[0].isfinite().flatten(1).all(dim=1)
            return [(int(each), 0, 0) for each in finite.tolist()]
        fed = self.now[0] if self.fed is None else self.fed
        # padding stays 0, or an overflow in it would reach real positions as 0 * inf; and no row
        # sees further than it would alone
        first = [row.reach if self.by_front else 0 for row in self.rows]
        behind = [min(row.end + 1, row.length) if row.running else 0 for row in self.rows]
        low, high = torch.tensor([first, behind], device=device)[:, :, None]  # (R, 1) each
        at = torch.arange(begin, end, device=device)
        new = (at >= low) & (at < high)  # (R, N)
        state, log_probs = self.now[0][:, begin:end], self.now[1][:, begin:end]
        few = ROUNDINGS if self.by_front or self.config.tolerance != 0 else 0
        exactly = (roundings(said.state, fed[:, begin:end]) <= few) | ~new | self.inert
        roughly = exactly
        if self.config.window is not None and self.config.allowed_step > 0:
            # of a start, the log-probabilities may be none that a pass ever said
            moved = largest((said.state - fed[:, begin:end]).abs())
            moved = torch.maximum(moved, (said.log_probs - log_probs).abs())
            roughly = exactly | (moved <= self.config.allowed_step)
        still = torch.stack([exactly, roughly]).long().cumprod(dim=2).sum(dim=2)  # (2, R)
        log_probs = torch.where(new, said.log_probs, log_probs)  # those of a start may not be known
        if self.by_front and not self.inert:
            # what is final keeps the value that its cached keys were computed with
            new &= at >= begin + still[1][:, None]
        state = torch.where(new.view(*new.shape, *[1] * (state.ndim - 2)), said.state, state)
        state, log_probs = (
            torch.cat([old[:, :begin], part, old[:, end:]], dim=1)  # observers keep what they saw
            for old, part in zip(self.now, (state, log_probs), strict=True)
        )
        self.now = (state, log_probs)
        finite = state.isfinite().flatten(1).all(dim=1)
        # the one wait for a device
        table: list[tuple[int, int, int]] = torch.cat([finite[None].long(), still]).T.tolist()
        return table

    def next(self, *, leave: bool) -> None:
        """Make the state for the next pass; rows that have ended leave first, if they may."""
        assert self.now is not None
        damping, fed = self.config.damping, self.now[0]
        if damping != 1.0:
            fed = damping * fed if self.fed is None else (1 - damping) * self.fed + damping * fed
        ended = [i for i, row in enumerate(self.rows) if not row.running]
        if ended and not leave:  # whoever goes on, they say again what they said last
            fed = fed.clone()
            fed[ended] = 0.0 if self.fed is None else self.fed[ended]
        self.fed = fed
        kept = [i for i, row in enumerate(self.rows) if row.running]
        if leave and len(kept) < len(self.rows):
            self._put_away()
            self.rows = [self.rows[i] for i in kept]
            T = max(row.length for row in self.rows)
            self.fed = self.fed[kept, :T]
            self.now = (self.now[0][kept, :T], self.now[1][kept, :T])
            if self.cycles is not None:
                self.cycles.keep(kept, T)

    def _put_away(self) -> tuple[Tensor, Tensor]:
        """Write the rows of the last pass to where those of the whole batch are."""
        assert self.now is not None
        if self.ended is None:
            self.ended = (self.now[0].clone(), self.now[1].clone())
        for whole, values in zip(self.ended, self.now, strict=True):
            whole[[row.number for row in self.rows], : values.size(1)] = values
        return self.ended

    def result(self) -> Recomputed:
        assert self.now is not None
        state, log_probs = self.now if self.ended is None else self._put_away()
        outcomes = [self.outcomes[row.number] for row in self.all]
        settled = [
            row.goal if outcome is Outcome.SETTLED else min(row.reach, row.goal)
            for row, outcome in zip(self.all, outcomes, strict=True)
        ]
        return Recomputed(state, log_probs, outcomes, [row.passes for row in self.all], settled)
