"""How every figure looks, and how it is saved: the same bytes for the same runs.

Colours are safe for colour-blind readers; colour means strength alone. Knows nothing of what is
drawn. Figures are made without pyplot, so that no backend and no matplotlibrc of a reader matters.
"""

from __future__ import annotations

import io
import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.output import write_whole
from analysis.runs import Runs
from analysis.text import number, printable, short, visible

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 10.0,
    "text.parse_math": False,  # a $ in a token is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 2.0,
    "savefig.dpi": 150,
    "svg.hashsalt": "stateful_gpt",  # the same ids in every SVG
    "svg.fonttype": "path",
}
INK = "#222222"
QUIET = "#666666"
ABSENT = "#d9d9d9"
ZERO = "#444444"
# light for weak strengths, dark for strong ones: blue below zero, warm above
BELOW_ZERO = LinearSegmentedColormap.from_list("below_zero", ["#9ecbe8", "#3b8bc4", "#0b3c7f"])
ABOVE_ZERO = LinearSegmentedColormap.from_list("above_zero", ["#f5bf7a", "#e0682b", "#8f1d14"])
# of a change: blue less expected than by the plain model, warm more expected
CHANGE = LinearSegmentedColormap.from_list(
    "change", ["#0b3c7f", "#3b8bc4", "#f7f7f7", "#e0682b", "#8f1d14"]
)
# Okabe and Ito, without the yellow that is lost on white: for what has no strength
DISTINCT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
MOST_FACETS = 4
FEW = 8  # of so many texts the whole range is shown, of more the middle 80 %
P = ParamSpec("P")


class NotDrawn(Exception):
    """These runs cannot fill the figure; the text says why in a few words."""


@contextmanager
def _house_style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change the bytes
        matplotlib.rcParams.update(SETTINGS)
        yield


def in_house_style(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """The same figure, whatever settings of matplotlib the reader has."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _house_style():
            return draw(*args, **kwargs)

    return drawn


def sheet(
    *,
    title: str,
    caption: str,
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    **grid: Any,
) -> tuple[Figure, np.ndarray]:
    """A figure with title above, caption below, and (rows, columns) axes; sizes in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.03, hspace=0.03)
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    lines = wrap(drawable(title), width, size=14.0)
    figure.suptitle(lines, x=0.012, ha="left", fontsize=14.0, fontweight="bold", color=INK)
    lines = wrap(drawable(caption), width, size=9.0)
    figure.supxlabel(lines, x=0.012, ha="left", fontsize=9.0, color=QUIET)
    return figure, figure.subplots(rows, columns, squeeze=False, **grid)


def wrap(text: str, width: float, *, size: float) -> str:
    """Breaks lines so that text of this size (points) stays within a width (inches)."""
    characters = int((width - 0.3) * 72 / (size * (0.62 if size > 10 else 0.54)))
    return "\n".join(textwrap.wrap(text, max(characters, 20), break_long_words=True))


def png(figure: Figure, metadata: dict[str, str] | None = None) -> bytes:
    return _saved(figure, "png", metadata or {})


def save(figure: Figure, path: Path, *, run_ids: Sequence[str], command: str) -> list[Path]:
    """Writes `<path>.png` and `<path>.svg`, which name their runs and how to redraw them."""
    title = " ".join(figure.get_suptitle().split())
    runs = printable("runs: " + ", ".join(dict.fromkeys(run_ids)))
    redraw = printable(f"redraw: {command}")
    software = "stateful_gpt analysis"
    kinds: dict[str, dict[str, str | None]] = {
        "png": {"Title": title, "Description": runs, "Comment": redraw, "Software": software},
        # no date: the same runs give the same bytes on any day
        "svg": {
            "Title": title,
            "Description": f"{runs}; {redraw}",
            "Creator": software,
            "Date": None,
        },
    }
    paths = []
    for kind, metadata in kinds.items():
        target = path.with_name(f"{path.name}.{kind}")
        write_whole(target, _saved(figure, kind, metadata))
        figure.set_layout_engine("none")  # laid out once: the next format takes it as it is
        paths.append(target)
    return paths


def _saved(figure: Figure, kind: str, metadata: dict[str, str | None] | dict[str, str]) -> bytes:
    content = io.BytesIO()
    with _house_style():
        figure.savefig(content, format=kind, metadata=metadata)
    return content.getvalue()


# --- text ---------------------------------------------------------------------------------------


@cache
def _glyphs() -> frozenset[int]:
    mono = FT2Font(findfont("DejaVu Sans Mono")).get_charmap()
    return frozenset(FT2Font(findfont("DejaVu Sans")).get_charmap()) & frozenset(mono)


def drawable(text: str) -> str:
    """The text in characters that the fonts of matplotlib have; others as their code point."""
    return "".join(
        one if ord(one) in _glyphs() and not unicodedata.combining(one) else f"⟨{ord(one):X}⟩"
        for one in printable(text)
    )


def token_text(token: str, length: int = 14) -> str:
    """`"\\n the"` as `↵␣the`."""
    return drawable(short(visible(token), length))


def name_of(prompt_id: str, length: int = 30) -> str:
    return drawable(short(visible(prompt_id, spaces=False), length))


# --- strengths ----------------------------------------------------------------------------------


def facets(runs: Runs, *, least: int = 1) -> tuple[dict[str, pd.DataFrame], str]:
    """Runs that differ in strength and seed at most, by what they share; and a note on the rest.

    Args:
        least: how many strengths a facet must have.
    """
    fed = runs.runs[runs.runs["strength"].notna()]
    groups = {
        str(variant): group
        for variant, group in fed.groupby("variant", sort=False)
        if group["strength"].nunique() >= least
    }
    shown = dict(list(groups.items())[:MOST_FACETS])
    left = len(groups) - len(shown)
    return shown, f" {left} more kinds of run are not shown; --run chooses." if left else ""


def colours(strengths: Sequence[float]) -> dict[float, str]:
    """A colour a strength: the stronger, the darker; zero is grey."""
    made = {0.0: ZERO}
    for side, scale in ((-1.0, BELOW_ZERO), (1.0, ABOVE_ZERO)):
        sizes = sorted({abs(strength) for strength in strengths if strength * side > 0})
        for rank, size in enumerate(sizes):
            made[side * size] = to_hex(scale(1.0 if len(sizes) == 1 else rank / (len(sizes) - 1)))
    return made


def by_strength(frame: pd.DataFrame) -> Iterator[tuple[float, pd.DataFrame]]:
    """The rows of each strength, weakest first."""
    for strength, same in frame.groupby("strength"):
        yield float(str(strength)), same


def symbol(group: pd.DataFrame) -> str:
    """β, or s where hidden states are fed back."""
    return "s" if (group["kind"] == "hidden_state").all() else "β"


def strength_axis(axes: Axes, strengths: Sequence[float], *, label: str, gap: float = 0.06) -> None:
    """Strengths at their distances: logarithmic on both sides, linear about zero.

    Args:
        gap: between two strengths that are both marked, as a part of the axis.
    """
    ordered = sorted(set(strengths))
    sizes = [abs(strength) for strength in ordered if strength]
    axes.set_xscale("symlog", linthresh=min(sizes, default=1.0), linscale=0.6)
    scale = axes.xaxis.get_transform().transform
    reach = float(np.ptp(scale(np.array(ordered)))) or 1.0
    edges = scale(np.array([ordered[0], ordered[-1]])) + np.array([-0.05, 0.05]) * reach
    axes.set_xlim(*axes.xaxis.get_transform().inverted().transform(edges))
    marked: list[float] = []
    for strength in sorted(ordered, key=lambda one: (one != 0, -abs(one))):
        if all(
            abs(float(np.diff(scale(np.array([strength, other])))[0])) > gap * reach
            for other in marked
        ):
            marked.append(strength)
    axes.xaxis.set_major_locator(FixedLocator(sorted(marked)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_xlabel(label)


def pass_axis(axes: Axes, first: float, last: float, *, label: str) -> None:
    axes.set_xlim(first - 0.5, max(last, first + 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel(label)


def whisker(
    axes: Axes, x: float, ends: tuple[float, float, float], colour: str, mark: str = "o"
) -> None:
    """A mark at the first of `ends`, with a bar from the second to the third."""
    at, low, high = ends
    reach = np.clip([[at - low], [high - at]], 0.0, None)  # a mean may round past its extremes
    axes.errorbar(x, at, yerr=reach, fmt=mark, color=colour, capsize=3)


def mean_and_range(values: pd.Series) -> tuple[float, float, float]:
    numbers = values.astype(float)
    return float(numbers.mean()), float(numbers.min()), float(numbers.max())


def quantiles(count: int) -> tuple[float, float]:
    """The range of a few values, the middle 80 % of more."""
    return (0.0, 1.0) if count <= FEW else (0.1, 0.9)


def middle(values: pd.Series) -> tuple[float, float, float]:
    """Median, and the values at both `quantiles`."""
    low, high = (float(values.quantile(edge)) for edge in quantiles(len(values)))
    return float(values.median()), low, high


def power_text(value: float, _: object = None) -> str:
    """10⁻³ as plain text: mathtext is off, because tokens may hold a $."""
    exponent = round(math.log10(value))
    if -3 < exponent < 4:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def spread_words(count: int) -> str:
    if count == 1:
        return "one text"
    return f"the range over {count} texts" if count <= FEW else f"the middle 80 % of {count} texts"
