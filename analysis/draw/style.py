"""How every figure looks, and how it is saved: the same bytes for the same runs.

Colours are safe for colour-blind readers; colour means strength alone. Knows nothing of what is
drawn. Figures are made without pyplot, so that no backend and no matplotlibrc of a reader matters.
"""

import io
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

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
from matplotlib.ticker import MaxNLocator, NullLocator

from analysis.output import write_whole
from analysis.runs import Runs
from analysis.text import number, printable

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 10.0,
    "text.parse_math": False,  # a $ in a token is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.0,
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
BELOW_ZERO = LinearSegmentedColormap.from_list("below_zero", ["#7db8de", "#3b8bc4", "#0b3c7f"])
ABOVE_ZERO = LinearSegmentedColormap.from_list("above_zero", ["#eda84e", "#e0682b", "#8f1d14"])
# of a change: warm less expected than by the plain model, blue more, as on the page
CHANGE = LinearSegmentedColormap.from_list(
    "change", ["#8f1d14", "#e0682b", "#f7f7f7", "#3b8bc4", "#0b3c7f"]
)
# Okabe and Ito, without the yellow that is lost on white: for what has no strength
DISTINCT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
MOST_FACETS = 4
LETTER, GAP = 0.085, 0.04  # inches: of names of strengths that would touch one stands lower
FEW = 8  # of so many texts the whole range is shown, of more the middle 80 %


class NotDrawn(Exception):
    """These runs cannot fill the figure; the text says why in a few words."""


@contextmanager
def house_style() -> Iterator[None]:
    """As a decorator of what draws: a reader's own matplotlibrc must not change the bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def sheet(
    title: str, caption: str, size: tuple[float, float], shape: tuple[int, int], **grid: Any
) -> tuple[Figure, np.ndarray]:
    """A figure (inches) with title above, caption below, and axes of the shape (rows, columns)."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.03, hspace=0.03)
    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    for write, text, points, letter, style in (
        (figure.suptitle, title, 14.0, 0.57, {"fontweight": "bold", "color": INK}),
        (figure.supxlabel, caption, 9.0, 0.54, {"color": QUIET}),
    ):
        lines = textwrap.fill(drawable(text), int((size[0] - 0.3) * 72 / (points * letter)))
        write(lines, x=0.012, ha="left", fontsize=points, **style)
    return figure, figure.subplots(*shape, squeeze=False, **grid)


def panel_title(axes: Axes, text: str, width: float) -> None:
    """A title above a panel, in lines of so many inches."""
    points = 10.5 * 0.54  # of a letter
    axes.set_title(textwrap.fill(drawable(text), int(width * 72 / points)))


@house_style()
def rendered(figure: Figure, kind: str, metadata: dict[str, str | None] | None = None) -> bytes:
    """The figure as `png` or `svg`."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, metadata=metadata or {})
    figure.set_layout_engine("none")  # laid out once: the next format takes it as it is
    return content.getvalue()


def save(figure: Figure, path: Path, *, run_ids: Sequence[str], command: str) -> Iterator[Path]:
    """Writes `<path>.png` and `<path>.svg`, which name their runs and how to redraw them."""
    title = " ".join(figure.get_suptitle().split())
    runs = printable("runs: " + ", ".join(dict.fromkeys(run_ids)))
    redraw = printable(f"redraw: {command}")
    maker = "stateful_gpt analysis"
    about: dict[str, dict[str, str | None]] = {
        "png": {"Title": title, "Description": runs, "Comment": redraw, "Software": maker},
        # no date: the same runs give the same bytes on any day
        "svg": {"Title": title, "Description": f"{runs}; {redraw}", "Creator": maker, "Date": None},
    }
    for kind, metadata in about.items():
        place = path.with_name(f"{path.name}.{kind}")
        write_whole(place, rendered(figure, kind, metadata))
        yield place


@cache
def _glyphs() -> frozenset[int]:
    fonts = (FT2Font(findfont(name)).get_charmap() for name in ("DejaVu Sans", "DejaVu Sans Mono"))
    return frozenset.intersection(*map(frozenset, fonts))


def drawable(text: str) -> str:
    """The text in characters that the fonts of matplotlib have; others as their code point."""
    return "".join(
        one if ord(one) in _glyphs() and not unicodedata.combining(one) else f"⟨{ord(one):X}⟩"
        for one in printable(text)
    )


def facets(
    runs: Runs, *, least: int = 1, most: int = MOST_FACETS
) -> tuple[dict[str, pd.DataFrame], str]:
    """Runs that differ in strength and seed at most, by what they share; and a note on the rest.

    There are at most `most` facets, and at least `least` strengths in each.
    """
    fed = runs.runs[runs.runs["strength"].notna()]
    groups = {
        str(variant): group
        for variant, group in fed.groupby("variant", sort=False)
        if group["strength"].nunique() >= least
    }
    shown = dict(list(groups.items())[:most])
    left = len(groups) - len(shown)
    return shown, f" Kinds of run not shown: {left}; --run chooses." if left else ""


def colours(strengths: pd.Series) -> dict[Any, str]:
    """A colour a strength: the stronger, the darker; zero is grey."""
    made = {0.0: ZERO}
    for side, scale in ((-1.0, BELOW_ZERO), (1.0, ABOVE_ZERO)):
        sizes = sorted({abs(strength) for strength in strengths if strength * side > 0})
        ranks = np.linspace(0, 1, len(sizes)) if len(sizes) > 1 else [1.0]
        made |= {side * size: to_hex(scale(rank)) for size, rank in zip(sizes, ranks, strict=False)}
    return made


def symbol(group: pd.DataFrame) -> str:
    """β, or s where hidden states are fed back."""
    return "s" if (group["kind"] == "hidden_state").all() else "β"


def strength_axis(axes: Axes, group: pd.DataFrame) -> None:
    """Strengths at their distances: logarithmic on both sides, linear about zero."""
    strengths = np.unique(group["strength"].astype(float))
    sizes = np.abs(strengths[strengths != 0])
    axes.set_xscale("symlog", linthresh=sizes.min() if len(sizes) else 1.0, linscale=0.6)
    scale = axes.xaxis.get_transform()
    places = scale.transform(strengths)
    reach = np.ptp(places) or 1.0
    axes.set_xlim(*scale.inverted().transform(places[[0, -1]] + [-0.05 * reach, 0.05 * reach]))
    inches = axes.bbox.width / axes.figure.dpi / reach
    names = [number(strength) for strength in strengths]
    rows: list[list[int]] = [[], [], []]  # what does not fit beside another goes below it
    for one in np.lexsort((-np.abs(strengths), strengths != 0)):  # zero, then the strongest first
        for row in rows:
            widths = [(len(names[one]) + len(names[other])) / 2 * LETTER for other in row]
            if (np.abs(places[one] - places[row]) * inches > np.add(widths, GAP)).all():
                row.append(one)
                break
    marked = [(one, "\n" * below + names[one]) for below, row in enumerate(rows) for one in row]
    axes.set_xticks([strengths[one] for one, _ in marked], [name for _, name in marked])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"Feedback strength {symbol(group)}")


def pass_axis(axes: Axes, first: float, last: float, *, label: str) -> None:
    axes.set_xlim(first - 0.5, max(last, first + 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel(label)


def log_axis(axes: Axes) -> None:
    """Logarithmic, with powers as plain text: mathtext is off, because tokens may hold a $."""

    def spelt(value: float, _: object) -> str:
        digits = str(round(np.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{value:g}" if 1e-3 < value < 1e4 else f"10{digits}"

    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(spelt)
    low, high = np.log10(axes.get_ylim())
    if np.floor(high) <= np.ceil(low):  # one power of ten tells no scale
        axes.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))


def whisker(axes: Axes, x: Any, ends: Iterable[float], colour: str, mark: str = "o") -> None:
    """A mark at the first of `ends`, with a bar from the second to the third."""
    at, low, high = ends
    reach = np.clip([[at - low], [high - at]], 0.0, None)  # a mean may round past its extremes
    axes.errorbar(x, at, yerr=reach, fmt=mark, color=colour, capsize=3)


def band(axes: Axes, ends: pd.DataFrame, colour: str, mark: Any = None, **style: Any) -> None:
    """A line through the first column, shaded from the second to the third; a circle at `mark`."""
    line, low, high = (ends[name].astype(float) for name in ends)
    axes.fill_between(ends.index.astype(float), low, high, color=colour, alpha=0.15, linewidth=0)
    point = "o" if len(line) == 1 else None  # a line of its own it has not
    axes.plot(ends.index, line, marker=point, color=colour, **style)
    if mark in ends.index:
        axes.plot(mark, line[mark], "o", color=colour)


def nothing(axes: Axes, words: str = "no value recorded") -> None:
    """Says why a panel is empty."""
    axes.text(0.5, 0.5, words, color=QUIET, ha="center").set_transform(axes.transAxes)


def evenly(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many rows: first and last, and others evenly between."""
    places = np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)
    return rows.iloc[places]


def spread(values: pd.DataFrame, texts: int) -> pd.DataFrame:
    """(columns, 3): median and range of each, or the middle 80 % of so many texts."""
    low, high = (0.0, 1.0) if texts <= FEW else (0.1, 0.9)
    ends = values.quantile([0.5, low, high])
    return ends.set_axis(["median", "low", "high"]).T


def texts_of(prompts: pd.DataFrame) -> int:
    """Of how many texts a run is at most: different runs may read different ones."""
    return int(prompts.groupby("run")["prompt_id"].nunique().max())


def spread_words(prompts: pd.DataFrame) -> str:
    count = texts_of(prompts)
    many = f"{count} text{'s' if count > 1 else ''}"
    return f"the range over {many}" if count <= FEW else f"the middle 80\u00a0% of {many}"
