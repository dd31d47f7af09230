"""The fixed-point loop on toy passes: when it ends, with what outcome, and that rows are alone.

Shapes: B batch, T positions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.recompute import (
    Iteration,
    Outcome,
    RecomputeConfig,
    Recomputed,
    Said,
    Span,
    recompute,
)


def saying(function: Callable[[Tensor], Tensor], *, batch: int = 1, length: int = 4) -> Callable:
    """A pass whose state is its log-probabilities."""

    def run(state: Tensor | None, _: Span) -> Said:
        fed = torch.zeros(batch, length, dtype=torch.float64) if state is None else state
        values = function(fed)
        return Said(state=values, log_probs=values)

    return run


def triangular_pass(batch: int, length: int, *, seed: int = 0, gain: float = 1.0) -> Callable:
    """What it says of position j is a function of the state before j, never exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = gain * torch.randn(length, length, generator=generator, dtype=torch.float64).tril(-1)
    drive = 1 + torch.rand(batch, length, generator=generator, dtype=torch.float64)
    drive[:, 0] = 0.0

    def says(fed: Tensor) -> Tensor:
        # written as a loop over rows: a matrix product may round a row by its batch mates
        return torch.stack(
            [(weights @ fed[b]).sin() - drive[b] for b in range(batch)]
        ) * torch.tensor([0.0] + [1.0] * (length - 1), dtype=torch.float64)

    return saying(says, batch=batch, length=length)


def run(
    a_pass: Callable,
    *,
    iterations: int = 64,
    tolerance: float | str = 0.0,
    damping: float = 1.0,
    lengths: Sequence[int] = (4,),
    **options: object,
) -> tuple[Recomputed, list[Iteration]]:
    seen: list[Iteration] = []
    result = recompute(
        a_pass,
        config=RecomputeConfig(iterations=iterations, tolerance=tolerance, damping=damping),
        lengths=list(lengths),
        observe=seen.append,
        **options,
    )
    return result, seen


def steps(seen: list[Iteration], row: int = 0) -> list[float]:
    """The largest step of a row in each pass from the second on."""
    found = []
    for it in seen[1:]:
        assert it.step_max is not None
        found.append(it.step_max[it.span.rows.index(row)].item())
    return found


# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 5, 17])
def test_tolerance_zero_runs_exactly_the_iterations(iterations: int) -> None:
    for a_pass in (triangular_pass(1, 4), saying(lambda fed: -fed - 1)):
        result, seen = run(a_pass, iterations=iterations)
        assert [it.number for it in seen] == list(range(1, iterations + 1))
        assert result.iterations == [iterations]


@given(length=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_a_triangular_pass_is_settled_at_the_bound(length: int, seed: int) -> None:
    result, seen = run(triangular_pass(1, length, seed=seed), tolerance=1e-15, lengths=[length])
    assert result.outcomes == [Outcome.SETTLED]
    assert result.iterations == [max(1, length - 1)]
    assert len(seen) == max(1, length - 1)
    assert result.settled == [length]


def test_with_tolerance_zero_the_outcome_is_settled_from_the_bound_on() -> None:
    expected = [Outcome.ITERATION_LIMIT] * 2 + [Outcome.SETTLED] * 3
    for iterations, outcome in enumerate(expected, start=1):
        result, _ = run(triangular_pass(1, 4), iterations=iterations)
        assert result.outcomes == [outcome]


def test_a_step_of_exactly_zero_is_settled_though_no_theorem_says_so() -> None:
    result, seen = run(saying(lambda fed: fed * 0 - 3), tolerance=1e-9, triangular=False)
    assert result.outcomes == [Outcome.SETTLED]
    # pass 1 says -3 of a state of 0; pass 2 says -3 of -3
    assert result.iterations == [2]
    assert steps(seen) == [0.0]


@pytest.mark.parametrize("tolerance", ["auto", 1e-3])
def test_a_step_within_rounding_is_settled_whatever_the_tolerance(tolerance: float | str) -> None:
    # a start that carries on, whose last bits are those of another batch
    fixed = torch.full((1, 4), -3.0, dtype=torch.float64)
    said, start = saying(lambda fed: fed * 0 + fixed), fixed * (1 + 1e-15)
    result, _ = run(said, tolerance=tolerance, damping=0.5, start=start)
    assert (result.outcomes, result.iterations) == ([Outcome.SETTLED], [1])


@pytest.mark.parametrize("tolerance", ["auto", 1e-9])
def test_where_nothing_is_fed_back_damping_keeps_nobody_from_settling(
    tolerance: float | str,
) -> None:
    said = saying(lambda fed: fed * 0 - 3)
    result, _ = run(said, iterations=9, tolerance=tolerance, damping=0.5, inert=True)
    assert (result.outcomes, result.iterations) == ([Outcome.SETTLED], [1])


@given(factor=st.floats(0.05, 0.9), tolerance=st.floats(1e-9, 1e-2))
def test_within_tolerance_at_the_first_small_enough_step(factor: float, tolerance: float) -> None:
    result, seen = run(
        saying(lambda fed: factor * fed - 1), iterations=500, tolerance=tolerance, triangular=False
    )
    # the step of pass n is factor ** (n - 1): the values are -(1 + f + ... + f ** (n - 1))
    moved = steps(seen)
    for n, step in enumerate(moved, start=2):
        assert step == pytest.approx(factor ** (n - 1), abs=1e-14)
    assert all(step > tolerance for step in moved[:-1])
    assert moved[-1] <= tolerance
    assert result.outcomes == [Outcome.WITHIN_TOLERANCE]
    assert result.iterations == [len(moved) + 1]


def test_running_out_of_iterations_is_said_so() -> None:
    result, seen = run(
        saying(lambda fed: 0.99 * fed - 1), iterations=7, tolerance=1e-6, triangular=False
    )
    assert result.outcomes == [Outcome.ITERATION_LIMIT]
    assert result.iterations == [7]
    assert len(seen) == 7


def test_the_first_pass_has_no_step_and_steps_have_their_size() -> None:
    values = iter([[0.0, -1.0, -2.0, -9.0], [0.0, -1.5, -1.0, -100.0]])

    def one(_: Tensor | None, span: Span) -> Said:
        row = torch.tensor([next(values)], dtype=torch.float64)
        return Said(row, row)

    _, seen = run(one, iterations=2, lengths=[3])  # the fourth position is padding
    assert seen[0].step_max is None
    assert seen[0].step_rms is None
    assert steps(seen) == [1.0]
    assert seen[1].step_rms is not None
    assert seen[1].step_rms.tolist() == [pytest.approx(math.sqrt((0.25 + 1.0) / 3))]


# --- cycles -------------------------------------------------------------------------------------


def test_an_exact_two_cycle() -> None:
    result, seen = run(saying(lambda fed: -1 - fed), tolerance=1e-6, triangular=False)
    assert result.outcomes == [Outcome.CYCLE]
    # -1, 0, -1, 0: two returns, at passes 3 and 4, are one whole period
    assert result.iterations == [4]
    assert len(seen) == 4


@pytest.mark.parametrize("period", [2, 3, 5, 8])
def test_cycles_up_to_the_longest_period(period: int) -> None:
    def turn(fed: Tensor) -> Tensor:
        return -((-fed + 1) % period)

    result, _ = run(saying(turn), tolerance=1e-6, triangular=False)
    assert result.outcomes == [Outcome.CYCLE]
    assert result.iterations == [2 * period]


def test_a_longer_period_is_not_called_a_cycle() -> None:
    result, _ = run(
        saying(lambda fed: -((-fed + 1) % 9)), tolerance=1e-6, triangular=False, iterations=60
    )
    assert result.outcomes == [Outcome.ITERATION_LIMIT]


def test_a_cycle_up_to_rounding_is_one_and_a_slow_spiral_is_not() -> None:
    def almost(factor: float) -> Callable:
        # each pass turns the distance from the fixed point, -0.5, over and scales it
        return saying(lambda fed: -0.5 - factor * (fed + 0.5))

    rounding, _ = run(almost(1.0 - 2**-53), tolerance=1e-9, triangular=False)
    assert rounding.outcomes == [Outcome.CYCLE]
    spiral, _ = run(almost(1.0 - 1e-6), tolerance=1e-9, triangular=False)
    assert spiral.outcomes == [Outcome.ITERATION_LIMIT]


def test_a_cycle_runs_on_when_all_iterations_are_wanted() -> None:
    result, seen = run(saying(lambda fed: -1 - fed), iterations=11, triangular=False)
    assert len(seen) == 11
    assert result.outcomes == [Outcome.CYCLE]


def test_settling_is_no_cycle() -> None:
    result, _ = run(saying(lambda fed: 0 * fed - 1), iterations=20, triangular=False)
    assert result.outcomes == [Outcome.SETTLED]


@pytest.mark.parametrize(
    ("factor", "outcome", "passes"),
    # pass n moves by f ** (n - 1): 0.5 ** 10 is the first below; a period of -1 is seen twice
    [(0.5, Outcome.WITHIN_TOLERANCE, 11), (-1.0, Outcome.CYCLE, 4)],
)
def test_a_state_that_log_probabilities_do_not_show_counts_too(
    factor: float, outcome: Outcome, passes: int
) -> None:
    def one(state: Tensor | None, _: Span) -> Said:
        fed = torch.zeros(1, 4, 2, dtype=torch.float64) if state is None else state
        return Said(factor * fed - 1, fed.new_zeros(1, 4))

    result, _ = run(one, tolerance=1e-3, triangular=False)
    assert (result.outcomes, result.iterations) == ([outcome], [passes])


# --- divergence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_divergence_ends_the_row_at_the_pass_that_shows_it(
    poison: float, tolerance: float, at: int
) -> None:
    count = 0

    def says(fed: Tensor) -> Tensor:
        nonlocal count
        count += 1
        values = fed - 1
        if count == at:
            values[0, 2] = poison
        return values

    result, seen = run(saying(says), tolerance=tolerance, triangular=False, iterations=9)
    assert result.outcomes == [Outcome.DIVERGED]
    assert result.iterations == [at]
    assert len(seen) == at


def test_padding_may_say_anything() -> None:
    def says(fed: Tensor) -> Tensor:
        values = 0 * fed.nan_to_num() - 1
        values[:, 2:] = math.nan
        return values

    result, _ = run(saying(says), tolerance=1e-3, lengths=[2], triangular=False)
    assert result.outcomes == [Outcome.SETTLED]


def test_a_divergence_after_the_bound_is_still_one() -> None:
    count = 0

    def says(fed: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return fed * 0 + (math.nan if count == 6 else -1.0)

    result, _ = run(saying(says), iterations=9)
    assert result.outcomes == [Outcome.DIVERGED]
    assert result.iterations == [6]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"tolerance": -1e-3}, "tolerance must be auto or at least 0, got -0.001"),
        ({"tolerance": math.nan}, "tolerance must be auto or at least 0, got nan"),
        ({"tolerance": None}, "tolerance must be auto or at least 0, got None"),
        ({"tolerance": "none"}, "tolerance must be auto or at least 0, got 'none'"),
        ({"damping": 0.0}, "damping must be above 0 and at most 1, got 0.0"),
        ({"damping": 1.5}, "damping must be above 0 and at most 1, got 1.5"),
        ({"damping": math.nan}, "damping must be above 0 and at most 1, got nan"),
    ],
)
def test_an_impossible_recompute_is_refused(chosen: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RecomputeConfig(**chosen)


# --- damping ------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(damping=st.floats(0.2, 0.95), seed=st.integers(0, 2**31))
def test_damping_keeps_the_fixed_point_and_loses_the_finite_end(damping: float, seed: int) -> None:
    a_pass = triangular_pass(1, 5, seed=seed, gain=0.5)
    plain, _ = run(a_pass, iterations=4, lengths=[5])
    # 600 passes at a damping of 0.2: 0.8 ** 600 = 1e-58, times powers of 600 for the chain of five
    damped, _ = run(a_pass, iterations=600, damping=damping, lengths=[5])
    assert (damped.log_probs - plain.log_probs).abs().max() <= 1e-12
    at_the_bound, _ = run(a_pass, iterations=4, damping=damping, lengths=[5])
    assert (at_the_bound.log_probs - plain.log_probs).abs().max() > 1e-9
    assert at_the_bound.outcomes == [Outcome.ITERATION_LIMIT]
    assert at_the_bound.settled == [1]


@pytest.mark.parametrize("damping", [0.25, 1.0])
@pytest.mark.parametrize("cold", [True, False])
def test_damping_mixes_what_was_fed_with_what_was_said(damping: float, cold: bool) -> None:
    start = torch.tensor([[0.0, -4.0, -3.0, -2.0]], dtype=torch.float64)
    fed: list[Tensor | None] = []
    inner = saying(lambda state: 0.3 * state - 1)

    def spy(state: Tensor | None, span: Span) -> Said:
        fed.append(state)
        return inner(state, span)

    run(spy, iterations=4, damping=damping, start=None if cold else start, triangular=False)
    assert (fed[0] is None) == cold
    state = torch.zeros(1, 4, dtype=torch.float64) if cold else start
    for given_state in fed[1:]:
        state = (1 - damping) * state + damping * (0.3 * state - 1)
        assert given_state is not None
        assert (given_state - state).abs().max() <= 1e-15


@pytest.mark.parametrize("damping", [1.0, 0.3, 0.01])
def test_within_tolerance_means_as_near_however_small_damped_steps_are(damping: float) -> None:
    # x = 0.1 x - 1 has the solution -1/0.9
    options = {"tolerance": 1e-3, "iterations": 5000, "triangular": False}
    result, _ = run(saying(lambda fed: 0.1 * fed - 1), damping=damping, **options)
    assert result.outcomes == [Outcome.WITHIN_TOLERANCE]
    # a step of the tolerance leaves 1 / 0.9 of it to go at most
    assert (result.log_probs + 1 / 0.9).abs().max() <= 1.2e-3


def test_damping_tames_a_cycle() -> None:
    result, _ = run(saying(lambda fed: -1 - fed), damping=0.5, tolerance=1e-9, triangular=False)
    assert result.outcomes == [Outcome.SETTLED]
    assert (result.log_probs + 0.5).abs().max() == 0.0  # -1/2 = -1 - (-1/2)


# --- what is known to be settled ----------------------------------------------------------------


@given(
    length=st.integers(2, 10),
    known=st.integers(1, 10),
    iterations=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_a_right_prefix_of_k_is_k_plus_n_after_n_passes(
    length: int, known: int, iterations: int, seed: int
) -> None:
    known = min(known, length)
    a_pass = triangular_pass(1, length, seed=seed)
    exact = run(a_pass, iterations=length, lengths=[length])[0].state
    start = exact.clone()
    start[:, known:] = -7.5  # wrong from there on
    result, _ = run(a_pass, iterations=iterations, lengths=[length], start=start, settled=[known])
    right = result.settled[0]
    assert right == min(length, known + iterations)
    assert torch.equal(result.state[:, :right], exact[:, :right])
    enough = max(1, length - known)
    settled = iterations >= enough
    assert result.outcomes == [Outcome.SETTLED if settled else Outcome.ITERATION_LIMIT]
    stopped, _ = run(a_pass, tolerance=1e-300, lengths=[length], start=start, settled=[known])
    assert stopped.iterations == [enough]
    assert torch.equal(stopped.state, exact)


# --- batches ------------------------------------------------------------------------------------


def mixed_pass(factors: Sequence[float], length: int) -> Callable:
    """Row b goes its own way: contraction, cycle or explosion, by its factor."""
    column = torch.tensor(factors, dtype=torch.float64)[:, None]

    def run(state: Tensor | None, span: Span) -> Said:
        fed = torch.zeros(len(factors), length, dtype=torch.float64) if state is None else state
        values = column[span.rows] * fed - 1
        return Said(values, values)

    return run


FATES = [
    (0.1, Outcome.WITHIN_TOLERANCE),
    (0.7, Outcome.WITHIN_TOLERANCE),
    (-1.0, Outcome.CYCLE),
    (0.0, Outcome.SETTLED),
    (1e200, Outcome.DIVERGED),
    (1.0, Outcome.ITERATION_LIMIT),
]


@given(rows=st.lists(st.sampled_from(FATES), min_size=1, max_size=5), data=st.data())
def test_rows_end_independently_and_do_not_depend_on_their_mates(
    rows: list[tuple[float, Outcome]], data: st.DataObject
) -> None:
    lengths = [data.draw(st.integers(1, 4)) for _ in rows]
    together, seen = run(
        mixed_pass([factor for factor, _ in rows], 4),
        tolerance=1e-6,
        lengths=lengths,
        triangular=False,
        iterations=50,
    )
    assert together.outcomes == [outcome for _, outcome in rows]
    for row, (factor, _) in enumerate(rows):
        alone, seen_alone = run(
            mixed_pass([factor], 4),
            tolerance=1e-6,
            lengths=lengths[row : row + 1],
            triangular=False,
            iterations=50,
        )
        assert together.iterations[row] == alone.iterations[0]
        assert together.settled[row] == alone.settled[0]
        for ours, theirs in (
            (together.state, alone.state),
            (together.log_probs, alone.log_probs),
        ):
            assert torch.equal(ours[row].nan_to_num(7.0), theirs[0].nan_to_num(7.0))
        n = alone.iterations[0]
        # who has ended leaves, and is evaluated no more
        assert [row in it.span.rows for it in seen] == [True] * n + [False] * (len(seen) - n)
        assert len(seen_alone) == n
        moved, moved_alone = steps(seen[:n], row), steps(seen_alone)
        assert moved == moved_alone or any(math.isnan(step) for step in moved)
    assert len(seen) == max(together.iterations)


def test_a_row_that_stays_after_its_end_is_read_as_it_was_read_last() -> None:
    said: list[Tensor] = []
    inner = mixed_pass([factor for factor, _ in FATES], 4)

    def spy(state: Tensor | None, span: Span) -> Said:
        said.append(inner(state, span).log_probs)
        return Said(said[-1], said[-1])

    options = {"triangular": False, "tolerance": 1e-6, "iterations": 50, "leave": False}
    result, seen = run(spy, lengths=[4] * len(FATES), **options)
    assert result.outcomes == [outcome for _, outcome in FATES]
    for row, end in enumerate(result.iterations):
        assert [it.ran[row] for it in seen] == [number <= end for number in range(1, 51)]
        for later in said[end:]:
            assert torch.equal(later[row], said[end - 1][row])


def test_hidden_states_of_rank_three_are_a_state_too() -> None:
    counts = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)[:, None]

    def one(state: Tensor | None, span: Span) -> Said:
        fed = torch.zeros(2, 3, 5, dtype=torch.float64) if state is None else state
        # one less than the position before
        values = counts[: fed.size(1)] * (fed.roll(1, dims=1) - 1)
        return Said(values, values.sum(dim=2))

    result, _ = run(one, lengths=[3, 2], tolerance=1e-9)
    assert result.outcomes == [Outcome.SETTLED, Outcome.SETTLED]
    assert result.iterations == [2, 1]
    assert result.log_probs.tolist() == [[0.0, -5.0, -10.0], [0.0, -5.0, 0.0]]
