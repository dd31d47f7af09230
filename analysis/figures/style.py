"""How every figure looks: fonts, colours, titles, captions, log axes with a place for zero.

Colours are safe for colour-blind readers, and sign is also told by line style. Knows nothing of
runs beyond their strengths.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from analysis.series import Series

SETTINGS: dict[str, object] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 9.0,
    "text.parse_math": False,  # a $ in a token is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": False,
    "svg.hashsalt": "stateful_gpt",  # the same ids in every SVG
    "svg.fonttype": "path",
}
INK = "#222222"
QUIET = "#666666"
ABSENT = "#d9d9d9"
ACCENT = "#d55e00"
# dark near zero, light far from it: a black line is β = 0, blue is below it and warm above
BELOW_ZERO = LinearSegmentedColormap.from_list(
    "below_zero", ["#1b2668", "#1f63b0", "#2f97c4", "#62c3cf"]
)
ABOVE_ZERO = LinearSegmentedColormap.from_list(
    "above_zero", ["#5c1165", "#b3305f", "#e4592f", "#f7a81b"]
)
# Okabe and Ito, without the yellow that is lost on white
DISTINCT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
# Tol's muted set, with black: ten lines
TEN = (
    "#332288",
    "#cc6677",
    "#117733",
    "#88ccee",
    "#882255",
    "#ddaa33",
    "#44aa99",
    "#aa4499",
    "#999933",
    "#000000",
)
DASHES = ("solid", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Pen:
    """How one series is drawn wherever it appears."""

    colour: str
    dash: object


def pens(series: Sequence[Series]) -> dict[int, Pen]:
    """Colour for the strength and dash for its sign; for variants, dash or else colour."""
    variants = list(dict.fromkeys(one.variant for one in series))
    strengths = sorted({one.strength for one in series if one.strength is not None})
    if len(strengths) <= 1:
        return {
            one.run: Pen(
                DISTINCT[variants.index(one.variant) % len(DISTINCT)],
                DASHES[variants.index(one.variant) // len(DISTINCT) % len(DASHES)],
            )
            for one in series
        }
    colours = _strength_colours(strengths)
    with_strength = [v for v in variants if any(s.variant == v and s.strength for s in series)]
    made: dict[int, Pen] = {}
    for one in series:
        if one.strength is None:
            made[one.run] = Pen(QUIET, DASHES[2])
        elif len(with_strength) > 1:
            made[one.run] = Pen(
                colours[one.strength], DASHES[variants.index(one.variant) % len(DASHES)]
            )
        else:
            made[one.run] = Pen(colours[one.strength], DASHES[1 if one.strength < 0 else 0])
    return made


def _strength_colours(strengths: Sequence[float]) -> dict[float, str]:
    colours = {0.0: "#000000"}
    for side, scale in ((-1.0, BELOW_ZERO), (1.0, ABOVE_ZERO)):
        ordered = sorted(abs(strength) for strength in strengths if strength * side > 0)
        for rank, size in enumerate(ordered):
            place = 0.45 if len(ordered) == 1 else rank / (len(ordered) - 1)
            colours[side * size] = to_hex(scale(place))
    return colours


def sheet(
    *,
    title: str,
    caption: str,
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    legend: float = 0.0,
) -> tuple[Figure, np.ndarray]:
    """A figure with title above, caption below, and a (rows, columns) grid of axes.

    Sizes are in inches; `legend` is the room at the right of the title that a legend will take.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.03)
    figure.suptitle(
        wrap(title, width - legend, size=13.0),
        x=0.012,
        ha="left",
        fontsize=13.0,
        fontweight="bold",
        color=INK,
    )
    figure.supxlabel(wrap(caption, width, size=8.5), x=0.012, ha="left", fontsize=8.5, color=QUIET)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def wrap(text: str, width: float, *, size: float) -> str:
    """Breaks lines so that text of this size (points) stays within a width (inches)."""
    characters = int((width - 0.3) * 72 / (size * (0.62 if size > 10 else 0.54)))
    return "\n".join(textwrap.wrap(text, max(characters, 20), break_long_words=True))


def power_text(exponent: int) -> str:
    """10⁻³ as plain text: mathtext is off, because tokens may hold a $."""
    if -3 < exponent < 4:
        return str(10**exponent) if exponent >= 0 else f"{10.0**exponent:.{-exponent}f}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@dataclass(frozen=True)
class LogScale:
    """A log axis over positive values, with a marked floor for values that are exactly zero."""

    lowest: int  # decades
    highest: int
    floor: float | None  # where a zero is drawn; None when there is no zero

    @classmethod
    def over(cls, values: np.ndarray) -> LogScale:
        finite = values[np.isfinite(values)]
        positive = finite[finite > 0]
        lowest, highest = -3, 1
        if len(positive):
            lowest = int(np.floor(np.log10(positive.min())))
            highest = max(int(np.ceil(np.log10(positive.max()))), lowest + 1)
        drop = max(1.0, 0.07 * (highest - lowest))
        floor = 10.0 ** (lowest - drop) if (finite == 0).any() else None
        return cls(lowest=lowest, highest=highest, floor=floor)

    def place(self, values: np.ndarray) -> np.ndarray:
        return values if self.floor is None else np.where(values == 0, self.floor, values)

    def ticks(self) -> tuple[list[float], list[str]]:
        stride = max(1, -(-(self.highest - self.lowest) // 7))
        decades = list(range(self.highest, self.lowest - 1, -stride))[::-1]
        places = [10.0**decade for decade in decades]
        labels = [power_text(decade) for decade in decades]
        if self.floor is not None:
            return [self.floor, *places], ["exactly 0", *labels]
        return places, labels

    def apply(self, axes: Axes) -> None:
        axes.set_yscale("log")
        bottom = 10.0 ** (self.lowest - 0.3)
        if self.floor is not None:
            middle = np.sqrt(self.floor * 10.0**self.lowest)
            bottom = self.floor**2 / middle
            axes.axhspan(bottom, middle, color="#f3f3f3", zorder=0, linewidth=0)
        axes.set_ylim(bottom, 10.0 ** (self.highest + 0.15))
        places, labels = self.ticks()
        axes.yaxis.set_major_locator(FixedLocator(places))
        axes.yaxis.set_major_formatter(FixedFormatter(labels))
        axes.yaxis.set_minor_locator(NullLocator())


def count_axis(axes: Axes, first: float, last: float, *, label: str) -> None:
    """An x axis of whole numbers from `first` to `last`."""
    pad = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - pad, last + pad)
    axes.xaxis.set_major_locator(FixedLocator(count_ticks(int(first), int(last), most=8)))
    axes.set_xlabel(label)


def count_ticks(first: int, last: int, *, most: int) -> list[int]:
    """Whole numbers: the first, then round ones that keep clear of it."""
    strides = [base * 10**decade for decade in range(9) for base in (1, 2, 5)]
    stride = next(stride for stride in strides if (last - first) / stride <= most)
    return [first, *(n for n in range(0, last + 1, stride) if n - first >= max(0.5 * stride, 1))]
