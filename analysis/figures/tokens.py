"""Single tokens of one run: the heat map of all, and the paths of those that moved most."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from analysis.figures.drawing import Drawing, Skipped, file_name
from analysis.figures.style import ABSENT, ACCENT, INK, TEN, count_axis, count_ticks, sheet
from analysis.figures.text import prompt_name, token_label
from analysis.runs import Grid, Runs
from analysis.series import Series

MOST_TOKENS = 96
MOST_PATHS = 10
LOWEST = -25.0  # nats; a floor or a diverged value must not wash out the other tokens
MIN_PASSES = 8  # drawn even if all is quiet sooner
ROW = 0.155  # inches per token
ROW_LABEL = "Token, and its position in the text"
COLOUR_LABEL = "Log-probability of the token (nats)"


def most_moved(
    runs: Runs, series: tuple[Series, ...], prompt_id: str
) -> tuple[Series, Grid] | None:
    """The run whose estimates travelled most (mean over tokens), first one on a tie."""
    having = set(runs.summaries["run"][runs.summaries["prompt_id"] == prompt_id])
    best: tuple[float, Series, Grid] | None = None
    for one in series:
        if one.run not in having or runs.saved[one.run].trajectory is None:
            continue
        grid = runs.grid(one.run, prompt_id)
        moved = float(grid.movement.mean()) if grid.log_prob.size else -1.0
        if grid.log_prob.size and (best is None or moved > best[0]):
            best = moved, one, grid
    return None if best is None else (best[1], best[2])


@dataclass(frozen=True)
class HeatMap:
    """What the heat map of one run and prompt shows, whoever draws it.

    ``settled`` holds the (column, row) of each dot; ``edge`` the iteration where the front passes
    each row, None where no theorem says so.
    """

    title: str
    caption: str
    labels: tuple[str, ...]
    values: np.ndarray  # (rows, columns) nats
    iterations: np.ndarray  # of the columns
    settled: tuple[np.ndarray, np.ndarray]
    edge: np.ndarray | None

    @property
    def first(self) -> int:
        return int(self.iterations[0])


def heat_map_content(runs: Runs, one: Series, prompt_id: str, grid: Grid, *, among: int) -> HeatMap:
    """Token by iteration: each token's log-probability after each pass."""
    tolerance = reporting_tolerance(runs, one, prompt_id)
    grid, quiet = _eventful(grid, tolerance)
    rows = min(len(grid.positions), MOST_TOKENS)
    values, places = grid.log_prob[:rows], grid.positions[:rows] - grid.positions[0]
    notes = [
        "Each row is a token, each column a pass; bright: expected, dark: surprising.",
        f"White dot: from here on within {tolerance:g} nats of its last estimate.",
        *_front_note(one),
        *quiet,
        *_choice_notes(grid, rows, among),
    ]
    by_theorem = one.ends_by_theorem and places <= grid.iterations[-1]
    return HeatMap(
        title=f"What each pass says of each token: {prompt_name(prompt_id)}, {one.label}",
        caption=" ".join(notes),
        labels=token_labels(grid.tokens[:rows], grid.positions[:rows]),
        values=values,
        iterations=grid.iterations,
        settled=_settled(values, tolerance, also=by_theorem),
        # position j is final from iteration max(j, 1): the edge before that column
        edge=np.maximum(places, 1) - 0.5 if one.ends_by_theorem else None,
    )


def heat_map(runs: Runs, one: Series, prompt_id: str, grid: Grid, *, among: int) -> Drawing:
    content = heat_map_content(runs, one, prompt_id, grid, among=among)
    rows = len(content.labels)
    figure, axes_grid = sheet(
        title=content.title,
        caption=content.caption,
        width=8.5,
        height=max(2.2 + ROW * rows, 3.2),
    )
    axes = axes_grid[0, 0]
    image = estimate_image(axes, content.values, first=content.first)
    token_rows(axes, content.labels)
    axes.set_xlabel("Iteration (pass)")
    axes.set_xticks(count_ticks(content.first, int(content.iterations[-1]), most=12))
    _mark_settled(axes, content)
    colour_bar(figure, axes, image, content.values, COLOUR_LABEL)
    name = file_name("heat_map", prompt_id, runs.prompt_ids)
    return Drawing(name, content.title, figure, (one.run_id,))


def trajectories(
    runs: Runs, one: Series, prompt_id: str, grid: Grid, *, among: int
) -> Drawing | Skipped:
    """Log-probability by iteration of the tokens that travelled furthest."""
    name = file_name("trajectories", prompt_id, runs.prompt_ids)
    grid, quiet = _eventful(grid, reporting_tolerance(runs, one, prompt_id))
    order = np.argsort(-grid.movement, kind="stable")[:MOST_PATHS]
    chosen = [int(place) for place in order if grid.movement[place] > 0]
    if not chosen:
        return Skipped(name, f"no estimate moves in {prompt_id}, {one.label}")
    title = f"The tokens whose estimates move most: {prompt_name(prompt_id)}, {one.label}"
    notes = [
        f"The {len(chosen)} of {len(grid.positions)} tokens that travel furthest in all, each "
        "named at its last estimate with its position in the text.",
        *quiet,
        *_choice_notes(grid, len(grid.positions), among),
    ]
    figure, axes_grid = sheet(title=title, caption=" ".join(notes), width=9.0, height=5.2)
    axes = axes_grid[0, 0]
    ends = []
    for place, colour in zip(chosen, TEN, strict=False):
        y = grid.log_prob[place]
        axes.plot(grid.iterations, y, color=colour, marker="o", markersize=2.5, linewidth=1.3)
        finite = np.flatnonzero(np.isfinite(y))
        label = token_label(grid.tokens[place], int(grid.positions[place]))
        ends.append((float(grid.iterations[finite[-1]]), float(y[finite[-1]]), label, colour))
    count_axis(axes, 1, int(grid.iterations[-1]), label="Iteration (pass)")
    axes.set_ylabel("Log-probability of the token (nats)")
    _name_ends(axes, ends)
    return Drawing(name, title, figure, (one.run_id,))


def _eventful(grid: Grid, tolerance: float) -> tuple[Grid, list[str]]:
    """The passes in which something happens, if the rest are many, and a note that says so."""
    away = ~(np.abs(grid.log_prob - grid.log_prob[:, -1:]) <= tolerance)
    busy = np.flatnonzero(away.any(axis=0))
    kept = max(int(busy[-1]) + 4 if len(busy) else 0, MIN_PASSES)
    if kept > 0.7 * len(grid.iterations):
        return grid, []
    first, last = int(grid.iterations[kept]), int(grid.iterations[-1])
    note = f"Passes {first} to {last} move no estimate by {tolerance:g} nats and are left out."
    shown = replace(grid, iterations=grid.iterations[:kept], log_prob=grid.log_prob[:, :kept])
    return shown, [note]


def lowest_shown(values: np.ndarray) -> float:
    """Where the colours of log-probabilities end; they begin at 0 nats."""
    finite = values[np.isfinite(values)]
    lowest = float(np.floor(finite.min())) if len(finite) else -1.0
    return min(max(lowest, LOWEST), -1.0)


def estimate_image(axes: Axes, values: np.ndarray, *, first: int) -> AxesImage:
    """Rows of log-probabilities; a missing value is grey."""
    rows, columns = values.shape
    axes.grid(False)
    axes.set_facecolor(ABSENT)
    return axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=lowest_shown(values),
        vmax=0.0,
        extent=(first - 0.5, first + columns - 0.5, rows - 0.5, -0.5),
    )


def token_labels(tokens: tuple[str, ...], positions: np.ndarray) -> tuple[str, ...]:
    return tuple(
        token_label(token, int(position)) for token, position in zip(tokens, positions, strict=True)
    )


def token_rows(axes: Axes, labels: tuple[str, ...]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=7.0)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel(ROW_LABEL)


def colour_bar(
    figure: Figure, axes: Axes, image: AxesImage, values: np.ndarray, label: str
) -> None:
    below = np.isfinite(values).any() and np.nanmin(values) < image.norm.vmin
    bar = figure.colorbar(
        image, ax=axes, extend="min" if below else "neither", aspect=30, pad=0.015, shrink=0.9
    )
    bar.set_label(label)
    bar.outline.set_visible(False)


def reporting_tolerance(runs: Runs, one: Series, prompt_id: str) -> float:
    """The run's own, or the usual 1e-3 nats where it recorded none."""
    frame = runs.summaries
    rows = frame[(frame["run"] == one.run) & (frame["prompt_id"] == prompt_id)]
    value = rows["reporting_tolerance"].iloc[0]
    return 1e-3 if pd.isna(value) else float(value)


def _settled(
    values: np.ndarray, tolerance: float, *, also: np.ndarray | bool
) -> tuple[np.ndarray, np.ndarray]:
    """From which column on each row stays within the tolerance of its last: (columns, rows)."""
    far = ~(np.abs(values - values[:, -1:]) <= tolerance)
    moving = np.where(far.any(axis=1), far.shape[1] - np.argmax(far[:, ::-1], axis=1), 0)
    # the last pass agrees with itself: that alone settles nothing
    seen = (moving < values.shape[1] - 1) | also
    seen &= moving < values.shape[1]  # a value that is not a number at the end settles never
    return moving[seen], np.flatnonzero(seen)


def _mark_settled(axes: Axes, content: HeatMap) -> None:
    columns, rows = content.settled
    axes.plot(
        content.iterations[columns],
        rows,
        linestyle="none",
        marker="o",
        markersize=3.6,
        markerfacecolor="white",
        markeredgecolor=INK,
        markeredgewidth=0.7,
    )
    if content.edge is not None:
        place = np.arange(len(content.edge))
        left, right = axes.get_xlim()
        axes.plot(
            np.repeat(content.edge, 2),
            np.column_stack([place - 0.5, place + 0.5]).ravel(),
            color=ACCENT,
            linewidth=1.2,
        )
        axes.set_xlim(left, right)
        axes.set_ylim(len(place) - 0.5, -0.5)


def _front_note(one: Series) -> list[str]:
    if not one.ends_by_theorem:
        return []
    return ["Orange line: by theorem nothing changes to the right of it."]


def _choice_notes(grid: Grid, rows: int, among: int) -> list[str]:
    notes = []
    if grid.step > 0:
        notes.append(f"The passes of generation step {grid.step}, the last.")
    if rows < len(grid.positions):
        notes.append(f"The first {rows} of {len(grid.positions)} tokens.")
    if among > 1:
        notes.append(f"Of {among} runs, the one that moves most; --run chooses another.")
    if not np.isfinite(grid.log_prob).all():
        notes.append("Grey or broken off: not a number.")
    return notes


def _name_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Labels right of the axes, spread so that none touches the next, with leaders to the ends."""
    low, high = axes.get_ylim()
    span = high - low
    gap = 0.052
    wanted = sorted(ends, key=lambda end: end[1])
    places = _spread([(end[1] - low) / span for end in wanted], gap)
    for (x, y, label, colour), place in zip(wanted, places, strict=True):
        axes.annotate(
            label,
            xy=(x, y),
            xycoords="data",
            xytext=(1.06, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=INK,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "linestyle": (0, (1, 1.5)),
                "shrinkA": 1.0,
                "shrinkB": 0.0,
                "relpos": (0.0, 0.5),
            },
            annotation_clip=False,
        )


def _spread(places: list[float], gap: float) -> list[float]:
    """Rising places, moved as little as needed to be `gap` apart and inside 0 to 1."""
    groups: list[list[float]] = []  # each is spread evenly about its own mean
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _low(groups[-1], gap) < _low(groups[-2], gap) + gap * len(
            groups[-2]
        ):
            last = groups.pop()
            groups[-1] += last
    return [_low(group, gap) + gap * rank for group in groups for rank in range(len(group))]


def _low(group: list[float], gap: float) -> float:
    length = gap * (len(group) - 1)
    return min(max(sum(group) / len(group) - length / 2, 0.0), 1.0 - length)
