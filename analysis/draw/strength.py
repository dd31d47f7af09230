"""What the strength does: passes to rest and loss (headline), contraction and chaos (regimes)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.draw.style import (
    INK,
    NotDrawn,
    by_strength,
    colours,
    drawable,
    facets,
    in_house_style,
    middle,
    sheet,
    spread_words,
    strength_axis,
    symbol,
    whisker,
)
from analysis.intervals import paired
from analysis.runs import Runs

PANEL = 4.2  # inches


@in_house_style
def headline(runs: Runs) -> Figure:
    """Passes to rest, and the change of the loss with paired intervals, by strength."""
    groups, note = facets(runs, least=2)
    if not groups:
        raise NotDrawn("it needs two runs that differ in strength")
    guaranteed = _guaranteed(runs)
    needed = runs.prompts[runs.prompts["run"].isin(runs.runs.index)]["iterations_to_tolerance"]
    intervals = {
        variant: {
            strength: paired(runs.estimates[runs.estimates["run"].isin(same.index)])
            for strength, same in by_strength(group)
        }
        for variant, group in groups.items()
    }
    over = {one.over for found in intervals.values() for one in found.values() if one}
    texts = runs.prompts["prompt_id"].nunique()
    figure, grid = sheet(
        title=_headline(needed, guaranteed),
        caption=(
            f"Top: passes until every estimate is within {_tolerance(runs)} nats of its final "
            f"value; dot: median, bar: {spread_words(texts)}; ▲: not reached. Bottom: loss less "
            "the plain model's, token by token, with 95 % bootstrap intervals"
            + (f" (n = {' or '.join(sorted(over))})" if over else "")
            + f". Above 0 is worse.{note}"
        ),
        width=max(2.2 + PANEL * len(groups), 7.4),
        height=6.6,
        rows=2,
        columns=len(groups),
        sharey="row",
    )
    for column, (variant, group) in enumerate(groups.items()):
        top, bottom = grid[:, column]
        strengths = list(group["strength"])
        shade = colours(strengths)
        label = f"Feedback strength {symbol(group)}"
        if len(groups) > 1:
            top.set_title(drawable(variant))
        for strength, same in by_strength(group):
            passes = runs.prompts[runs.prompts["run"].isin(same.index)]
            _passes(top, strength, passes, shade[strength])
            interval = intervals[variant][strength]
            if interval is not None:
                ends = (interval.mean, interval.low, interval.high)
                whisker(bottom, strength, ends, shade[strength])
            else:
                change = (same["nll"] - same["nll_plain"]).mean()
                bottom.plot(strength, change, "o", color=shade[strength], fillstyle="none")
        for axes in (top, bottom):
            strength_axis(axes, strengths, label=label if axes is bottom else "")
        bottom.axhline(0.0, color=INK, linewidth=1.0)
    top_left, bottom_left = grid[:, 0]
    top_left.set_ylim(0, top_left.get_ylim()[1] * 1.05)
    top_left.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    top_left.set_ylabel("Passes to rest")
    bottom_left.set_ylabel("Loss above plain model\n(nats/token)")
    return figure


def _headline(needed: pd.Series, guaranteed: int | None) -> str:
    if needed.isna().all():
        return "What the strength of the feedback does: no text comes to rest"
    words = f"Estimates are at rest after at most {needed.max():.0f} passes"
    if needed.isna().any():
        words = (
            f"{needed.notna().sum()} of {len(needed)} texts are at rest, after at most "
            f"{needed.max():.0f} passes"
        )
    return words + (f"; {guaranteed} are guaranteed" if guaranteed else "")


def _guaranteed(runs: Runs) -> int | None:
    """T - 1 of the longest text, where the theorem bounds every run."""
    length = (runs.prompts["prompt_tokens"] + runs.prompts["generated_tokens"].fillna(0)).max()
    bounded = runs.runs["ends_by_theorem"].all() and not pd.isna(length) and length > 1
    return int(length) - 1 if bounded else None


def _tolerance(runs: Runs) -> str:
    values = runs.prompts["reporting_tolerance"].dropna().unique()
    return " or ".join(f"{value:g}" for value in sorted(values)) or "a tolerance"


def _passes(axes: Axes, strength: float, prompts: pd.DataFrame, colour: str) -> None:
    needed = prompts["iterations_to_tolerance"].dropna()
    limit = 0.0
    if len(needed):
        ends = middle(needed)
        whisker(axes, strength, ends, colour)
        limit = ends[2]
    missing = prompts["iterations"][prompts["iterations_to_tolerance"].isna()]
    if len(missing):
        limit = float(np.nanmax([limit, missing.max()]))
        axes.plot(strength, limit, "^", color=colour, markersize=8)


@in_house_style
def regimes(runs: Runs) -> Figure:
    """Contraction rate and Lyapunov exponent by strength, and passes predicted against needed."""
    groups, note = facets(runs, least=2)
    prompts = runs.prompts.join(runs.runs[["strength", "variant"]], on="run")
    if not groups or prompts[["rate", "lyapunov"]].isna().all(axis=None):
        raise NotDrawn("it needs two runs of other strengths with a rate or Lyapunov exponent")
    prompts["predicted"] = _predicted(runs, prompts)
    growing = prompts[prompts["lyapunov"] > 0]
    title = "Small changes die out along the text at every strength"
    if len(growing):
        known = prompts["lyapunov"].notna().sum()
        weakest = growing["strength"].abs().min()
        title = (
            f"Small changes grow along the text in {len(growing)} of {known} cases, from a "
            f"strength of {weakest:g} on"
        )
    if prompts["lyapunov"].isna().all():
        title = "How fast the passes contract"
    texts = prompts["prompt_id"].nunique()
    figure, grid = sheet(
        title=title,
        caption=(
            "Left: factor by which a pass shrinks the distance to the end; at 1 it would not. "
            "Middle: growth rate of a small change along the text; above 0 is chaos. Dots and "
            f"bars: median and {spread_words(texts)}. Right: passes to rest as the first error "
            f"and the rate predict them against those needed, a dot a text and strength.{note}"
        ),
        width=11.0,
        height=1.4 + 3.4 * len(groups),
        rows=len(groups),
        columns=3,
    )
    for row, (variant, group) in zip(grid, groups.items(), strict=True):
        strengths = list(group["strength"])
        shade = colours(strengths)
        chosen = prompts[prompts["run"].isin(group.index)]
        for axes, measure, line in ((row[0], "rate", 1.0), (row[1], "lyapunov", 0.0)):
            for strength, same in by_strength(chosen):
                values = same[measure][np.isfinite(same[measure])]
                if len(values):
                    whisker(axes, strength, middle(values), shade[strength])
            axes.axhline(line, color=INK, linewidth=1.0)
            strength_axis(axes, strengths, label=f"Feedback strength {symbol(group)}", gap=0.11)
        row[0].set_ylim(bottom=0)
        row[0].set_ylabel("Contraction rate (per pass)")
        row[1].set_ylabel("Lyapunov exponent (per token)")
        both = chosen.dropna(subset=["predicted", "iterations_to_tolerance"])
        shades = [shade[strength] for strength in both["strength"].astype(float)]
        row[2].scatter(both["predicted"], both["iterations_to_tolerance"], c=shades, s=22)
        most = (
            max(both[["predicted", "iterations_to_tolerance"]].max().max(), 2.0) * 1.08
            if len(both)
            else 2.0
        )
        row[2].plot([0, most], [0, most], color=INK, linewidth=1.0)
        row[2].set(
            xlim=(0, most), ylim=(0, most), xlabel="Passes predicted", ylabel="Passes needed"
        )
        if len(groups) > 1:
            row[0].set_title(drawable(variant))
    return figure


def _predicted(runs: Runs, prompts: pd.DataFrame) -> pd.Series:
    """Passes until an error that shrinks by the rate from its first value is within tolerance."""
    last = runs.iterations.groupby(["run", "prompt_id"])["step"].transform("max")
    begun = runs.iterations[(runs.iterations["iteration"] == 1) & (runs.iterations["step"] == last)]
    error = begun.set_index(["run", "prompt_id"])["oracle_error_max"]
    first = error.reindex(pd.MultiIndex.from_frame(prompts[["run", "prompt_id"]])).to_numpy()
    rate = prompts["rate"].where(prompts["rate"].between(0, 1, inclusive="neither"))
    with np.errstate(divide="ignore", invalid="ignore"):
        passes = 1 + np.log(first / prompts["reporting_tolerance"]) / -np.log(rate)
    predicted: pd.Series = passes.where(np.isfinite(passes)).clip(lower=1)
    return predicted
