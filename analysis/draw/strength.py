"""What the strength does: passes to rest and loss (headline), contraction and chaos (regimes)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.draw import style
from analysis.frames import grouped, last_step
from analysis.intervals import paired
from analysis.runs import Runs

PANEL = 4.2  # inches
PANELS = 3  # side by side
LOSS = "Loss above plain model\n(nats/token)"


@style.house_style()
def headline(runs: Runs) -> Figure:
    """Passes to rest, and the change of the loss with paired intervals, by strength."""
    groups, note = style.facets(runs, least=2, most=2 * PANELS)
    if not groups:
        raise style.NotDrawn("it needs two runs that differ in strength")
    columns = min(len(groups), PANELS)
    rows = -(-len(groups) // columns)  # of pairs
    intervals = paired(runs.estimates, pd.concat(groups.values())["group"])
    over = sorted({one.over for one in intervals.values()})
    texts = runs.prompts.groupby("run")["prompt_id"].nunique().max()
    tolerances = sorted(runs.prompts["reporting_tolerance"].dropna().unique())
    tolerance = " or ".join(f"{value:g}" for value in tolerances) or "a tolerance"
    figure, grid = style.sheet(
        title=_headline(runs),
        caption=(
            f"Top: passes until every estimate is within {tolerance} nats of its final value; "
            f"dot: median, bar: {style.spread_words(texts)}; ▲: not reached. Bottom: loss less "
            "the plain model's, token by token, with 95 % bootstrap intervals"
            + (f" (n = {' or '.join(over)})" if over else "")
            + f". Above 0 is worse.{note}"
        ),
        width=max(2.2 + PANEL * columns, 7.4),
        height=1.0 + 5.6 * rows,
        shape=(2 * rows, columns),
    )
    pairs = [
        grid[2 * row : 2 * row + 2, column] for row in range(rows) for column in range(columns)
    ]
    for top, bottom in pairs[1:]:
        top.sharey(pairs[0][0])
        bottom.sharey(pairs[0][1])
    for (top, bottom), (variant, group) in zip(pairs, groups.items(), strict=False):
        shade = style.colours(group["strength"])
        for strength, same in grouped(group, "strength"):
            prompts = runs.prompts[runs.prompts["run"].isin(same.index)]
            needed = prompts["iterations_to_tolerance"]
            if needed.notna().any():
                style.whisker(top, strength, style.middle(needed.dropna()), shade[strength])
            if needed.isna().any():
                most = prompts["iterations"][needed.isna()].max()
                top.plot(strength, most, "^", color=shade[strength], markersize=8)
            interval = intervals.get(same["group"].iloc[0])
            if interval is not None:
                ends = (interval.mean, interval.low, interval.high)
                style.whisker(bottom, strength, ends, shade[strength])
            else:
                change = (same["nll"] - same["nll_plain"]).mean()
                bottom.plot(strength, change, "o", color=shade[strength], fillstyle="none")
        if len(groups) > 1:
            top.set_title(style.drawable(variant))
        for axes in (top, bottom):
            style.strength_axis(axes, group)
        bottom.axhline(0.0, color=style.INK, linewidth=1.0)
        top.set_xlabel("")
    top = pairs[0][0]
    top.set_ylim(0, top.get_ylim()[1] * 1.05)
    top.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    for number, pair in enumerate(pairs):
        for axes, name in zip(pair, ("Passes to rest", LOSS), strict=True):
            if number % columns == 0:
                axes.set_ylabel(name)
            axes.tick_params(labelleft=number % columns == 0)
            axes.set_visible(number < len(groups))
    return figure


def _headline(runs: Runs) -> str:
    needed = runs.prompts["iterations_to_tolerance"]
    if needed.isna().all():
        return "What the strength of the feedback does: no text comes to rest"
    words = "Estimates are at rest after"
    if needed.isna().any():
        words = f"{needed.notna().sum()} of {len(needed)} texts reach their fixed point, after"
    words += f" at most {needed.max():.0f} passes"
    # T - 1 of the longest text, where the theorem bounds every run
    length = (runs.prompts["prompt_tokens"] + runs.prompts["generated_tokens"].fillna(0)).max()
    bounded = runs.runs["ends_by_theorem"].all() and length > 1
    return words + (f"; {length - 1:.0f} are guaranteed" if bounded else "")


@style.house_style()
def regimes(runs: Runs) -> Figure:
    """Contraction rate and Lyapunov exponent by strength, and passes predicted against needed."""
    groups, note = style.facets(runs, least=2)
    prompts = runs.prompts.join(runs.runs["strength"], on="run")
    prompts = prompts.join(_predicted(runs), on=["run", "prompt_id"])
    known = prompts[["rate", "lyapunov"]].notna().any()
    if not groups or not known.any():
        raise style.NotDrawn(
            "it needs two runs of other strengths with a rate or Lyapunov exponent"
        )
    growing = prompts[prompts["lyapunov"] > 0]
    title = "Small changes die out along the text at every strength"
    if not known["lyapunov"]:
        title = "How fast the passes contract"
    elif len(growing):
        title = (
            f"Small changes grow along the text in {len(growing)} of "
            f"{prompts['lyapunov'].count()} cases, from a strength of "
            f"{growing['strength'].abs().min():g} on"
        )
    figure, grid = style.sheet(
        title=title,
        caption=(
            "Left: factor by which a pass shrinks the distance to the end; at 1 it would not. "
            "Middle: growth rate of a small change along the text; above 0 is chaos. Dots, bars: "
            f"median and {style.spread_words(prompts['prompt_id'].nunique())}. Right: passes to "
            "rest as first error and rate predict them, against those needed; a dot a text and "
            f"strength.{note}"
        ),
        width=11.0,
        height=1.6 + 3.4 * len(groups),
        shape=(len(groups), 3),
    )
    for row, (variant, group) in zip(grid, groups.items(), strict=True):
        shade = style.colours(group["strength"])
        chosen = prompts[prompts["run"].isin(group.index)]
        for axes, measure, line, name in (
            (row[0], "rate", 1.0, "Contraction rate (per pass)"),
            (row[1], "lyapunov", 0.0, "Lyapunov exponent (per token)"),
        ):
            for strength, same in grouped(chosen[np.isfinite(chosen[measure])], "strength"):
                style.whisker(axes, strength, style.middle(same[measure]), shade[strength])
            axes.axhline(line, color=style.INK, linewidth=1.0)
            axes.set_ylabel(name)
            style.strength_axis(axes, group)
        row[0].set_ylim(bottom=0)
        both = chosen[["predicted", "iterations_to_tolerance", "strength"]].dropna()
        row[2].scatter(*both.to_numpy().T[:2], c=both["strength"].map(shade), s=22)
        most = 1.08 * both.to_numpy()[:, :2].max(initial=2.0)
        row[2].plot([0, most], [0, most], color=style.INK, linewidth=1.0)
        row[2].set(xlim=(0, most), ylim=(0, most), xlabel="Passes predicted")
        row[2].set_ylabel("Passes needed")
        for axis in (row[2].xaxis, row[2].yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        if len(groups) > 1:
            row[0].set_title(style.drawable(variant))
    return figure


def _predicted(runs: Runs) -> pd.Series:
    """Passes until an error that shrinks by the rate from its first value is within tolerance."""
    begun = last_step(runs.iterations[runs.iterations["iteration"] == 1])
    keys = ["run", "prompt_id"]
    first = begun.set_index(keys)["oracle_error_max"]
    prompts = runs.prompts.set_index(keys)
    rate = prompts["rate"].where(prompts["rate"].between(0, 1, inclusive="neither"))
    shrinks = (first.where(first > 0) / prompts["reporting_tolerance"]).reindex(prompts.index)
    predicted = 1 - np.log(shrinks) / np.log(rate)
    known: pd.Series = predicted.where(np.isfinite(predicted)).clip(lower=1).rename("predicted")
    return known
