"""Numbers of hand-made trajectories, whose answers are known without a model."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from stateful_gpt.convergence import (
    contraction_rate,
    iterations_to_tolerance,
    rounding_floor,
    settled_prefixes,
)

FINAL = torch.tensor([0.0, -1.0, -2.0, -3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("log_probs", "prefix"),
    [
        ([0.0, -1.0, -2.0, -3.0], 4),
        ([0.0, -1.0, -2.0, -3.5], 3),
        ([0.0, -1.5, -2.0, -3.0], 1),  # later agreement does not count
        ([0.5, -1.0, -2.0, -3.0], 0),
        ([0.0, -1.1, -1.9, -3.0], 4),  # exactly at the tolerance is within it
        ([0.0, -1.0, math.nan, -3.0], 2),
        ([0.0, -math.inf, -2.0, -3.0], 1),
    ],
)
def test_settled_prefix_counts_leading_positions(log_probs: list[float], prefix: int) -> None:
    values = torch.tensor(log_probs, dtype=torch.float64)
    # a tenth and a rounding: -1.1 is not 0.1 away from -1 in binary
    assert settled_prefixes([values, FINAL], tolerance=0.1 + 1e-12) == [prefix] * 2


def test_settled_prefix_of_tolerance_zero_wants_equality() -> None:
    assert settled_prefixes([FINAL, FINAL], tolerance=0.0) == [4, 4]
    assert settled_prefixes([FINAL + 1e-16, FINAL], tolerance=0.0) == [0, 0]


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([], None),
        ([1.0, 0.5, 0.2], None),
        ([0.1], 1),
        ([1.0, 0.1, 0.01], 2),
        ([0.05, 0.5, 0.1, 0.0], 3),  # it must stay there
        ([1.0, 0.05, 0.2], None),
        ([1.0, math.nan, 0.05], 3),
        ([1.0, 0.05, math.nan], None),
    ],
)
def test_iterations_to_tolerance_is_the_first_pass_that_stays(
    errors: list[float], expected: int | None
) -> None:
    assert iterations_to_tolerance(errors, tolerance=0.1) == expected


@given(
    factor=st.floats(0.01, 3.0),
    scale=st.floats(1e-3, 10.0),
    count=st.integers(5, 30),
)
def test_a_known_contraction_factor_is_recovered(factor: float, scale: float, count: int) -> None:
    errors = [scale * factor**n for n in range(count)]
    assume(abs(factor - 1) > 1e-6)  # an error that never moves is at rest from the outset
    # what comes within four times the last error may be its plateau; three have to lie above
    above = sum(error > 4 * errors[-1] for error in errors)
    assume(above == 0 or above >= 3)
    assert contraction_rate(errors, floor=1e-14) == pytest.approx(factor, rel=1e-9)


def test_rounding_does_not_bend_the_rate() -> None:
    # 0.1 a pass down to 1e-12, then noise: only what is above the floor is fitted
    errors = [10.0**-n for n in range(1, 13)] + [3e-16, 2e-16, 3e-16, 0.0]
    assert contraction_rate(errors, floor=1e-15) == pytest.approx(0.1, rel=1e-9)


@given(
    errors=st.lists(st.floats(1e-9, 10.0) | st.just(math.nan), min_size=1, max_size=12),
    at_rest=st.integers(0, 600),
    floor=st.sampled_from([0.0, 1e-6, 1e-3]),
)
def test_passes_at_rest_never_change_the_rate(
    errors: list[float], at_rest: int, floor: float
) -> None:
    longer = errors + errors[-1:] * at_rest
    assert contraction_rate(longer, floor=floor) == contraction_rate(errors, floor=floor)


@pytest.mark.parametrize("iterations", [9, 16, 64, 600])
@pytest.mark.parametrize("jitter", [0.0, 0.02])
def test_the_fit_ends_at_the_errors_own_plateau(iterations: int, jitter: float) -> None:
    # 0.31 a pass, then a plateau of float32 rounding just above the floor
    errors = [5.3e-5 * (1 + jitter * (n % 2)) + 2 * 0.31**n for n in range(1, 9)]
    errors += [5.3e-5 * (1 + jitter * (n % 2)) for n in range(9, iterations + 1)]
    # what is left of the plateau in the last error that is fitted: at most a quarter of it
    assert contraction_rate(errors, floor=4.9e-5) == pytest.approx(0.31, abs=0.01)


def test_an_error_that_stays_and_ends_abruptly_has_a_rate_near_one() -> None:
    walking = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95]
    for errors in (walking, [*walking, 1e-5, 1e-5]):
        assert contraction_rate(errors, floor=1e-12) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    "errors",
    [[], [1.0], [1.0, 0.5], [1.0, 0.5, 0.0, 0.5, 0.25], [math.nan] * 5, [1.0, math.inf, 1.0]],
)
def test_a_rate_that_cannot_be_fitted_is_missing(errors: list[float]) -> None:
    assert contraction_rate(errors, floor=1e-12) is None


def test_rounding_floor_follows_the_dtype() -> None:
    values = torch.tensor([0.0, -8.0])
    assert rounding_floor(values) == 32 * 2**-23 * 8
    assert rounding_floor(values.double()) == 32 * 2**-52 * 8
    assert rounding_floor(values.double() / 100) == 32 * 2**-52  # never below that of 1 nat
