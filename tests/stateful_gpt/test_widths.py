"""The choice of a window's width, against texts whose estimates settle in a known way."""

import pytest

from stateful_gpt.widths import CPU, GPU, PATIENCE, Costs, Hardware, Width

COSTS = Costs(one=6, fixed=12)


def read(text: int, gain: float, costs: Costs | None = COSTS, start: int = 32) -> tuple[float, set]:
    """The cost of ``text`` positions of which a pass of width w settles max(1, gain w)."""
    width, left, spent, used = Width(start, costs), text, 0.0, set()
    while left > 0:
        used.add(width.now)
        spent += COSTS.of(width.now)
        settled = 1 if width.now == 1 else max(1, round(gain * width.now))
        left -= settled
        width.settled(settled)
    return spent, used


@pytest.mark.parametrize("gain", [0.0, 0.05, 0.1, 0.2, 0.4, 1.0])
def test_the_choice_costs_little_more_than_the_best_width_known_beforehand(gain: float) -> None:
    best = min(read(2000, gain, None, start)[0] for start in (1, 32, 64, 128, 256))
    # what it costs to find out: a round of each width on the way, and now and then another
    assert read(2000, gain)[0] <= 1.2 * best


def test_a_walking_front_is_read_one_position_at_a_time() -> None:
    spent, used = read(500, 0.0)
    assert 1 in used
    assert used <= {1, 32}
    # wide passes in vain twice, at the beginning and after the first rest, each with a last one
    assert spent <= (500 + 2 * PATIENCE) * COSTS.one + 2 * COSTS.of(32)


def test_quick_contraction_widens_the_window_to_the_most() -> None:
    assert 256 in read(4000, 0.5)[1]


def test_a_slow_beginning_is_forgiven() -> None:
    width, passes = Width(32, COSTS), 0
    while passes < 5:  # nothing of the first window settles yet
        width.settled(1)
        passes += 1
    assert width.now == 32


def test_a_long_stretch_that_walks_ends_wide_passes_however_well_it_began() -> None:
    width = Width(32, COSTS)
    while width.now < 512:
        width.settled(width.now)
    widths = [width.now]
    while width.now > 1 and len(widths) < 100:
        width.settled(1)
        widths.append(width.now)
    # from the widest to the first width, then to one position, each time after some patience
    assert list(dict.fromkeys(widths)) == [512, 32, 1]
    assert widths.count(512) <= -(-PATIENCE * COSTS.one // (COSTS.of(512) - COSTS.one)) + 1


def test_large_models_begin_with_narrower_windows_and_gpus_with_wider_ones() -> None:
    def width(hardware: Hardware, parameters: int, layers: int) -> int:
        return hardware.costs(layers=layers, parameters=parameters, bytes_each=4).width

    assert width(CPU, 3_500_000, 6) == 64
    assert width(CPU, 124_000_000, 12) == 16
    assert width(GPU, 124_000_000, 12) > 256


def test_without_costs_the_width_stays() -> None:
    assert read(100, 0.5, None, 7)[1] == {7}
