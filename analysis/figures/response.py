"""What the strength does: iterations needed, loss and effect, by strength."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.figures.drawing import Drawing, Skipped
from analysis.figures.strengths import (
    MOST_VARIANTS,
    comparable,
    left_out_notes,
    strength_axis,
    strength_ticks,
)
from analysis.figures.style import (
    DISTINCT,
    INK,
    QUIET,
    sheet,
    wrap,
)
from analysis.figures.text import prompt_name
from analysis.runs import Runs
from analysis.series import Series

MOST_PROMPTS = 6


def response(runs: Runs, series: tuple[Series, ...]) -> Drawing | Skipped:
    """Iterations to tolerance, nll and effect by strength: a line per prompt, and their mean."""
    ended = set(runs.summaries.dropna(subset=["outcome"])["run"])  # others broke off in W&B's log
    groups = comparable(tuple(one for one in series if one.run in ended))
    if not groups:
        return Skipped("response", "it needs two runs that differ in strength alone")
    shown = dict(list(groups.items())[:MOST_VARIANTS])
    title = "What the bias strength does to speed, loss and predictions"
    prompts = runs.prompt_ids[:MOST_PROMPTS]
    notes = [
        "Strengths are evenly spaced, not to scale. The mean is drawn where every prompt has a "
        "value. Dotted: the plain model's loss, without feedback.",
        *left_out_notes(groups, shown, series),
    ]
    if len(runs.prompt_ids) > len(prompts):
        notes.append(
            f"Lines: the first {len(prompts)} of {len(runs.prompt_ids)} prompts; mean: all."
        )
    figure, grid = sheet(
        title=title,
        caption=" ".join(notes),
        width=13.0,
        height=1.6 + 2.9 * len(shown),
        rows=len(shown),
        columns=3,
    )
    for row, (variant, group) in enumerate(shown.items()):
        places, names = strength_ticks(group, most=18)
        for column, measure in enumerate(("iterations_to_tolerance", "nll", "kl_effect")):
            axes = grid[row, column]
            values = _by_strength(runs, group, measure).replace([np.inf, -np.inf], np.nan)
            _prompt_lines(axes, values, prompts)
            if measure == "nll":
                _plain_lines(axes, _by_strength(runs, group, "nll_plain"), prompts)
            if measure == "iterations_to_tolerance":
                given = _by_strength(runs, group, "iterations")
                # the limit itself is only worth the room where somebody ran into it
                reach = given if values.isna().to_numpy().any() else values
                most = float(np.nanmax([values.max().max(), reach.max().max(), 1.0]))
                axes.set_ylim(0, 1.08 * most)
                axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
                _mark_missing(axes, values, prompts, _not_reached(values, given))
            elif values.notna().to_numpy().any():
                _mark_missing(axes, values, prompts, "no finite value recorded")
            else:
                _say(axes, "not recorded")
            size = 9.0 if len(places) < 8 else 8.0  # neighbours must not touch
            axes.set_xticks(places, names, rotation=90 if len(places) > 10 else 0, fontsize=size)
            axes.set_xlim(-0.5, len(group) - 0.5)
            if row + 1 == len(shown):
                axes.set_xlabel(strength_axis(series))
        tolerance = _tolerance(runs, group)
        titles = (
            f"Iterations until settled to {tolerance} nats",
            "Loss after the last pass",
            "Effect: how far predictions moved",
        )
        for axes, text in zip(grid[row], titles, strict=True):
            if row == 0:
                axes.set_title(text)
        heading = f"{wrap(variant, 3.0, size=9.0)}\n" if len(shown) > 1 else ""
        grid[row, 0].set_ylabel(f"{heading}Iterations (count)")
        grid[row, 1].set_ylabel("Mean −log-probability (nats/token)")
        grid[row, 2].set_ylabel("KL to the plain model (nats)")
    _prompt_legend(figure, prompts)
    drawn = tuple(one.run_id for group in shown.values() for one in group)
    return Drawing("response", title, figure, drawn)


def _by_strength(runs: Runs, group: Sequence[Series], measure: str) -> pd.DataFrame:
    """Prompts by runs, in the group's order."""
    frame = runs.summaries[runs.summaries["run"].isin([one.run for one in group])]
    table = frame.pivot_table(
        index="prompt_id", columns="run", values=measure, dropna=False, aggfunc="first", sort=False
    )
    prompts = [prompt for prompt in runs.prompt_ids if prompt in set(frame["prompt_id"])]
    return table.reindex(index=prompts, columns=[one.run for one in group])


def _prompt_lines(axes: Axes, values: pd.DataFrame, prompts: Sequence[str]) -> None:
    places = np.arange(values.shape[1])
    size = min(1.0, 24 / len(places))  # dots of neighbours must not run together
    for prompt, colour in zip(prompts, DISTINCT, strict=False):
        if prompt in values.index and len(values) > 1:
            y = values.loc[prompt]
            axes.plot(places, y, color=colour, marker="o", markersize=3.5 * size, linewidth=1.1)
    mean = values.mean(axis=0, skipna=False)
    axes.plot(places, mean, color=INK, marker="o", markersize=4.5 * size, linewidth=2.2, zorder=3)


def _plain_lines(axes: Axes, values: pd.DataFrame, prompts: Sequence[str]) -> None:
    places = np.arange(values.shape[1])
    for prompt, colour in zip(prompts, DISTINCT, strict=False):
        if prompt in values.index and len(values) > 1:
            axes.plot(places, values.loc[prompt], color=colour, linewidth=1.0, linestyle=":")
    axes.plot(places, values.mean(axis=0, skipna=False), color=INK, linewidth=1.6, linestyle=":")


def _mark_missing(axes: Axes, values: pd.DataFrame, prompts: Sequence[str], words: str) -> None:
    """A triangle on the top edge for each prompt that has no value, and words for why."""
    missing = values.isna()
    if not missing.to_numpy().any():
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, low + 1.15 * (high - low))  # room for the words above the lines
    for place, run in enumerate(values.columns):
        rows = [prompt for prompt in values.index if missing.loc[prompt, run]]
        for rank, prompt in enumerate(rows):
            colour = DISTINCT[prompts.index(prompt)] if prompt in prompts else QUIET
            offset = (rank - (len(rows) - 1) / 2) * min(0.16, 0.8 / len(rows))
            axes.plot(
                place + offset,
                1.0,
                transform=axes.get_xaxis_transform(),
                marker="^",
                markersize=7,
                color=colour if len(values) > 1 else INK,
                clip_on=False,
                zorder=5,
            )
    axes.text(
        0.01, 0.955, f"▲ {words}", transform=axes.transAxes, va="top", fontsize=8.0, color=INK
    )


def _not_reached(values: pd.DataFrame, given: pd.DataFrame) -> str:
    """How many iterations those had that did not get there."""
    limits = sorted(set(given.to_numpy()[values.isna().to_numpy() & given.notna().to_numpy()]))
    shown = [f"{limit:.0f}" for limit in limits]
    shown = shown if len(shown) < 4 else [f"{shown[0]}–{shown[-1]}"]  # runs may stop at any time
    return f"not reached within {', '.join(shown)}" if shown else "not reached"


def _tolerance(runs: Runs, group: Sequence[Series]) -> str:
    rows = runs.summaries["run"].isin([one.run for one in group])
    values = runs.summaries["reporting_tolerance"][rows].dropna().unique()
    return " or ".join(f"{value:g}" for value in sorted(values)) or "tolerance"


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET)
    axes.set_yticks([])


def _prompt_legend(figure: Figure, prompts: Sequence[str]) -> None:
    handles: list[Line2D] = [Line2D([], [], color=INK, linewidth=2.2, marker="o", markersize=4.5)]
    names = ["mean of prompts"]
    if len(prompts) > 1:
        for prompt, colour in zip(prompts, DISTINCT, strict=False):
            handles.append(Line2D([], [], color=colour, linewidth=1.1, marker="o", markersize=3.5))
            names.append(prompt_name(prompt, 20))
    else:
        names = [prompt_name(prompts[0], 20)]
    handles.append(Line2D([], [], color=INK, linewidth=1.6, linestyle=":"))
    names.append("plain model")
    figure.legend(handles, names, loc="outside right upper")
