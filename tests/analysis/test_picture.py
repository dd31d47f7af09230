import io

import matplotlib
import numpy as np
import pytest
from PIL import Image

from analysis.figures.picture import WIDTH, png
from analysis.figures.tokens import HeatMap

ORANGE, WHITE, GREY = (213, 94, 0), (255, 255, 255), (217, 217, 217)


def content(values: np.ndarray, **changes: object) -> HeatMap:
    rows, columns = values.shape
    nothing = np.zeros(0, dtype=int)
    known: dict[str, object] = {
        "title": "What each pass says of each token",
        "caption": "Bright: expected, dark: surprising.",
        "labels": tuple(f"token  {row}" for row in range(rows)),
        "values": values,
        "iterations": np.arange(1, columns + 1),
        "settled": (nothing, nothing),
        "edge": None,
    }
    return HeatMap(**(known | changes))  # type: ignore[arg-type]


def drawn(one: HeatMap) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(one))).convert("RGB"))


def cells(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows, columns, 3): the colour a quarter into each cell, clear of the dot in its middle."""
    coloured = ~((picture == picture.max(axis=2, keepdims=True)).all(axis=2))  # no grey, no white
    # the widest coloured rectangle is that of the cells: the rows and columns that have most
    ys = np.flatnonzero(coloured.sum(axis=1) > 0.3 * picture.shape[1])
    xs = np.flatnonzero(coloured[ys[0] : ys[-1]].sum(axis=0) > 0.6 * len(ys))
    xs = xs[: np.flatnonzero(np.diff(xs) > 1)[0] + 1]  # the colour bar is the second run
    left, right, top, bottom = xs[0], xs[-1] + 1, ys[0], ys[-1] + 1
    at_x = (left + (right - left) * (np.arange(columns) + 0.25) / columns).astype(int)
    at_y = (top + (bottom - top) * (np.arange(rows) + 0.25) / rows).astype(int)
    return picture[np.ix_(at_y, at_x)]


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (30, 9), (96, 60)])
def test_each_cell_has_the_colour_of_its_value(rows: int, columns: int) -> None:
    values = -np.random.default_rng(rows).uniform(0, 5.9, (rows, columns))
    values[0, 0] = -5.95  # so that the colours end at -6
    found = cells(drawn(content(values)), rows, columns)
    expected = matplotlib.colormaps["viridis"](1 + values / 6, bytes=True)[..., :3]
    np.testing.assert_array_equal(found, expected)


def test_what_is_no_number_is_grey_and_what_is_far_below_is_as_dark_as_can_be() -> None:
    values = np.full((20, 8), -3.0)
    values[4, 2], values[6, 5] = np.nan, -1e4
    found = cells(drawn(content(values)), 20, 8)
    assert tuple(found[4, 2]) == GREY
    assert tuple(found[6, 5]) == tuple(matplotlib.colormaps["viridis"](0.0, bytes=True)[:3])


def test_dots_and_the_front_are_drawn_where_they_belong() -> None:
    values = np.full((20, 8), -3.0)
    bare = drawn(content(values))
    edge = np.maximum(np.arange(20), 1) - 0.5
    marked = drawn(content(values, settled=(np.array([5]), np.array([9])), edge=edge))
    assert marked.shape == bare.shape
    changed = (marked != bare).any(axis=2)
    white = changed & (marked == WHITE).all(axis=2)
    orange = changed & (marked == ORANGE).all(axis=2)
    assert white.any()
    assert orange.any()
    # the dot: right of and below the middle of 8 columns and 20 rows; the front: down to the right
    ys, xs = np.nonzero(orange)
    assert np.corrcoef(xs, ys)[0, 1] > 0.9
    y, x = (axis.mean() for axis in np.nonzero(white))
    box = np.nonzero((bare == bare[round(y), round(x)]).all(axis=2))
    assert (x - box[1].min()) / (box[1].max() - box[1].min() + 1) == pytest.approx(5.5 / 8, abs=0.1)
    assert (y - box[0].min()) / (box[0].max() - box[0].min() + 1) == pytest.approx(
        9.5 / 20, abs=0.03
    )


def test_long_names_and_a_single_row_have_their_room() -> None:
    one = content(np.zeros((1, 1)), title="word " * 40, caption="word " * 90)
    picture = drawn(one)
    assert picture.shape[1] == WIDTH
    assert (picture[:, -3:] == 255).all(), "nothing runs out of the picture"
    assert (picture[-5:] == 255).all()
