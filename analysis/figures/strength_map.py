"""The error to the exact solution, by strength and pass, as a map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.figures.drawing import Drawing, Skipped
from analysis.figures.strengths import (
    MOST_VARIANTS,
    comparable,
    left_out_notes,
    strength_axis,
    strength_ticks,
)
from analysis.figures.style import (
    ABSENT,
    QUIET,
    count_ticks,
    power_text,
    sheet,
)
from analysis.runs import Runs
from analysis.series import Series

MOST_ROWS = 32


def strength_map(runs: Runs, series: tuple[Series, ...]) -> Drawing | Skipped:
    """Strength by iteration: the worst prompt's distance to the exact solution."""
    recorded = set(runs.iterations.dropna(subset=["oracle_error_max"])["run"])
    groups = comparable(tuple(one for one in series if one.run in recorded))
    if not groups:
        return Skipped(
            "strength_map", "it needs two runs with oracle errors that differ in strength alone"
        )
    shown = dict(list(groups.items())[:MOST_VARIANTS])
    title = "How far from the exact solution, by strength and pass"
    maps = {variant: _errors(runs, group) for variant, group in shown.items()}
    columns = max(values.shape[1] for values in maps.values())
    for variant, values in maps.items():
        room = ((0, 0), (0, columns - values.shape[1]))
        maps[variant] = np.pad(values, room, constant_values=np.nan)
    everything = np.concatenate(list(maps.values()))
    positive = everything[np.isfinite(everything) & (everything > 0)]
    if not len(positive):
        return Skipped("strength_map", "every oracle error is exactly 0")
    low = 10.0 ** np.floor(np.log10(positive.min()))
    high = max(10.0 ** np.ceil(np.log10(positive.max())), 10 * low)
    notes = [
        "Each row is a run, each column a pass; the worst token of the worst prompt counts, and a "
        "prompt that stopped early keeps its last error. Rows are evenly spaced, not to scale.",
        *(["White: exactly 0."] if (everything == 0).any() else []),
        *(["Grey: not run, or not a number."] if not np.isfinite(everything).all() else []),
        *left_out_notes(groups, shown, series),
    ]
    heights = [min(len(group), MOST_ROWS) for group in shown.values()]
    figure, grid = sheet(
        title=title,
        caption=" ".join(notes),
        width=10.0,
        height=2.0 + 0.32 * sum(heights) + 0.45 * len(heights),
        rows=len(shown),
    )
    grid[0, 0].get_gridspec().set_height_ratios(heights)
    for axes, (variant, group) in zip(grid[:, 0], shown.items(), strict=True):
        image = _error_image(axes, maps[variant], low, high)
        axes.set_yticks(*strength_ticks(group, most=MOST_ROWS))
        axes.tick_params(axis="y", length=0)
        axes.set_ylabel(strength_axis(group))
        axes.set_xticks(count_ticks(1, columns, most=12))
        if variant and len(shown) > 1:
            axes.set_title(variant)
    grid[-1, 0].set_xlabel("Iteration (pass)")
    _error_bar(figure, grid, image, low, high)
    drawn = tuple(one.run_id for group in shown.values() for one in group)
    return Drawing("strength_map", title, figure, drawn)


def _errors(runs: Runs, group: Sequence[Series]) -> np.ndarray:
    """(runs, iterations) worst error over prompts; NaN from where every prompt has stopped."""
    rows = []
    frame = runs.iterations
    for one in group:
        own = frame[frame["run"] == one.run]
        last = own["step"] == own.groupby("prompt_id")["step"].transform("max")
        table = own[last].pivot(index="iteration", columns="prompt_id", values="oracle_error_max")
        table = table.reindex(range(1, int(table.index.max()) + 1))
        rows.append(table.ffill().max(axis=1).to_numpy())
    longest = max(len(row) for row in rows)
    return np.array([np.pad(row, (0, longest - len(row)), constant_values=np.nan) for row in rows])


def _error_image(axes: Axes, values: np.ndarray, low: float, high: float) -> AxesImage:
    axes.grid(False)
    axes.set_facecolor(ABSENT)
    extent = (0.5, values.shape[1] + 0.5, len(values) - 0.5, -0.5)
    zero = values == 0
    named = zero.sum(axis=1) > 0.12 * values.shape[1] if len(values) <= MOST_ROWS else []
    for row in np.flatnonzero(named):
        start = int(np.argmax(zero[row]))
        axes.text(start + 0.5, int(row), " exactly 0", va="center", fontsize=8.0, color=QUIET)
    white = np.where(zero, 0.0, np.nan)  # the lightest grey of its map
    axes.imshow(
        np.ma.masked_invalid(white),
        aspect="auto",
        interpolation="nearest",
        cmap="Greys",
        vmin=0.0,
        vmax=1.0,
        extent=extent,
    )
    image = axes.imshow(
        np.ma.masked_where(~np.isfinite(values) | zero, values),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        norm=LogNorm(low, high),
        extent=extent,
    )
    if len(values) <= MOST_ROWS:
        axes.set_yticks(np.arange(0.5, len(values) - 1), minor=True)
    axes.grid(True, axis="y", which="minor", color="#bbbbbb", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    axes.tick_params(which="minor", length=0)
    return image


def _error_bar(figure: Figure, grid: np.ndarray, image: AxesImage, low: float, high: float) -> None:
    bar = figure.colorbar(image, ax=list(grid[:, 0]), pad=0.015, aspect=25)
    bar.set_label("Largest distance to\nthe exact solution (nats)", labelpad=10)
    bar.outline.set_visible(False)
    first, last = round(np.log10(low)), round(np.log10(high))
    stride = max(1, -(-(last - first) // 8))
    bar.ax.yaxis.set_major_locator(
        FixedLocator([10.0**decade for decade in range(last, first - 1, -stride)])
    )
    bar.ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: power_text(round(np.log10(value))))
    )
    bar.ax.yaxis.set_minor_locator(NullLocator())
