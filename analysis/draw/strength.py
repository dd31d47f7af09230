"""What the strength does: passes and loss (headline), contraction and growth (regimes)."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.draw import style
from analysis.intervals import paired
from analysis.labels import favoured, fed
from analysis.runs import Runs, last_step
from analysis.text import number, some

PANELS = 6  # side by side
# name, a line that divides two regimes, and what it means
MEASURES = {
    "rate": (
        "Contraction rate (per pass)",
        1.0,
        "Rate: factor by which a pass shrinks the distance to the end; at 1 it would not; no dot: "
        "too few passes to tell.",
    ),
    "lyapunov": (
        "Lyapunov exponent (per token)",
        0.0,
        "Exponent: how fast a small change grows along the text; below 0 it dies out.",
    ),
}
LOSS = "Loss above plain model\n(nats/token)"


@style.house_style()
def headline(runs: Runs) -> Figure:
    """Passes until settled, and the change of the loss with paired intervals, by strength."""
    ended = runs.prompts.dropna(subset=["outcome"])["run"]  # a torn history does not tell
    groups, note = style.facets(runs.where(pd.Index(ended.unique())), least=2, most=PANELS)
    if not groups:
        raise style.NotDrawn("it needs two runs that differ in strength and tell how they ended")
    panel = 4.2 if len(groups) <= 3 else 2.8  # inches
    shown = pd.concat(groups.values())
    intervals = paired(runs.estimates, shown["group"])
    alone = shown["change"].notna() & ~shown["group"].isin(intervals)
    texts = style.texts_of(runs.prompts)
    over = sorted({one.over for one in intervals.values()})
    tolerances = sorted(runs.prompts["reporting_tolerance"].dropna().unique())
    tolerance = f"{' or '.join(f'{value:g}' for value in tolerances) or '?'} nats"
    caption = (
        f"Top: passes until every estimate is within {tolerance} of where it ends, the exact "
        "solution where that is known; of the texts that get there, dot: median, bar: "
        f"{style.spread_words(runs.prompts)}; ▲: passes of those that do not. Bottom: loss "
        "less the plain model's, with paired 95 % bootstrap intervals"
        + (f" (n = {' or '.join(over)})" if over else "")
        + ("; hollow: the mean alone is known" if alone.any() else "")
        + f". Above 0 is worse.{favoured(shown)}{note}"
    )
    title = _headline(runs.where(shown.index[fed(shown)]), tolerance)
    size = (max(2.2 + panel * len(groups), 7.4), 6.6)
    figure, grid = style.sheet(title, caption, size, shape=(2, len(groups)), sharey="row")
    for (top, bottom), (variant, group) in zip(grid.T, groups.items(), strict=True):
        shade = style.colours(group["strength"])
        for strength, same in group.groupby("strength"):
            prompts = runs.prompts[runs.prompts["run"].isin(same.index)]
            needed = prompts["iterations_to_tolerance"]
            if needed.notna().any():
                ends = style.spread(needed.to_frame(), texts).iloc[0]
                style.whisker(top, strength, ends, shade[strength])
            if needed.isna().any():
                allowed = same["iterations_allowed"].astype(float)  # of a step, where a text grows
                most = min(prompts["iterations"][needed.isna()].max(), allowed.max())
                top.plot(strength, most, "^", color=shade[strength], markersize=8)
            interval = intervals.get(same["group"].iloc[0])
            if interval is not None:
                between = (interval.mean, interval.low, interval.high)
                style.whisker(bottom, strength, between, shade[strength])
            else:
                change = same["change"].mean()
                bottom.plot(strength, change, "o", color=shade[strength], fillstyle="none")
        if len(groups) > 1:
            style.panel_title(top, variant, panel - 0.4)
        for axes in (top, bottom):
            style.strength_axis(axes, group)
        bottom.axhline(0.0, color=style.INK, linewidth=1.0)
        top.set_xlabel("")
    top, bottom = grid[:, 0]
    top.set(ylim=(0, top.get_ylim()[1] * 1.05), ylabel=f"Passes to {tolerance}")
    top.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    bottom.set_ylabel(LOSS)
    return figure


def _headline(runs: Runs, tolerance: str) -> str:
    needed = runs.prompts["iterations_to_tolerance"]
    if needed.isna().all():
        return f"What the strength of the feedback does: no text settles to {tolerance}"
    most = needed.max()
    within = f"settle to {tolerance} within {most:.0f} pass{'es' if most > 1 else ''}"
    if needed.isna().any():
        return f"{needed.notna().sum()} of {len(needed)} times estimates {within}"
    # T - 1 of the longest text, or of its window, where the theorem bounds every run
    length = (runs.prompts["prompt_tokens"] + runs.prompts["generated_tokens"].fillna(0)).max()
    length = np.minimum(length, runs.iterations["settled_prefix"].max())
    bounded = runs.runs["ends_by_theorem"].all() and length > 1
    return f"All {within}" + (f"; {length - 1:.0f} are guaranteed" if bounded else "")


@style.house_style()
def regimes(runs: Runs) -> Figure:
    """Contraction rate and Lyapunov exponent by strength, and passes predicted against needed."""
    groups, note = style.facets(runs, least=2)
    runs = runs.where(pd.Index([run for group in groups.values() for run in group.index]))
    prompts = runs.prompts.join(runs.runs["strength"], on="run")
    prompts = prompts.join(_predicted(runs), on=["run", "prompt_id"])
    measures = [name for name in MEASURES if np.isfinite(prompts[name]).any()]
    if not measures:
        lacking = "it needs two runs of other strengths with a rate or Lyapunov exponent"
        raise style.NotDrawn(lacking)
    predictable = bool(prompts["predicted"].notna().any())
    dots = " Passes predicted: by the first error and the rate; a dot a text, coloured by strength."
    title = "How fast the passes contract"
    if "lyapunov" in measures:
        growing, count = prompts[prompts["lyapunov"] > 0], prompts["lyapunov"].count()
        change, share = ("grow", len(growing)) if len(growing) else ("die out", count)
        where = [number(strength) for strength in sorted(set(growing["strength"]))]
        at = f", at strength{'s' if len(where) > 1 else ''} {some(where, 4)}" if where else ""
        title = f"Small changes {change} along the text in {share} of {count} cases{at}"
    caption = (
        f"{' '.join(MEASURES[name][2] for name in measures)} Dots, bars: median and "
        f"{style.spread_words(prompts)}.{dots if predictable else ''}{note}"
    )
    texts, columns = style.texts_of(prompts), len(measures) + predictable
    size = (max(3.6 * columns, 7.4), 1.8 + 3.4 * len(groups))
    figure, grid = style.sheet(title, caption, size, shape=(len(groups), columns))
    for row, (variant, group) in zip(grid, groups.items(), strict=True):
        shade = style.colours(group["strength"])
        chosen = prompts[prompts["run"].isin(group.index)]
        for axes, measure in zip(row, measures, strict=False):
            name, line, _ = MEASURES[measure]
            known = chosen[np.isfinite(chosen[measure])]
            for strength, same in known.groupby("strength"):
                ends = style.spread(same[[measure]], texts).iloc[0]
                style.whisker(axes, strength, ends, shade[strength])
            axes.axhline(line, color=style.INK, linewidth=1.0)
            axes.set_ylabel(name)
            style.strength_axis(axes, group)
            if measure == "rate":
                axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
            if known.empty:
                style.nothing(axes)
        if predictable:
            _predictions(row[-1], chosen, shade)
        if len(groups) > 1:
            style.panel_title(row[0], variant, 3.2)
    return figure


def _predictions(axes: Axes, chosen: pd.DataFrame, shade: dict[float, str]) -> None:
    """Passes needed against those predicted, a dot a text and strength."""
    both = chosen[["predicted", "iterations_to_tolerance", "strength"]].dropna()
    needed, colours = both["iterations_to_tolerance"], both["strength"].map(shade)
    axes.scatter(both["predicted"], needed, c=colours, s=22)
    most = 1.08 * both.to_numpy()[:, :2].max(initial=2.0)
    if both.empty:
        style.nothing(axes)
    else:
        axes.plot([0, most], [0, most], color=style.INK, linewidth=1.0)
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="Passes predicted", ylabel="Passes needed")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))


def _predicted(runs: Runs) -> pd.Series:
    """Passes until an error that shrinks by the rate from its first value is within tolerance."""
    begun = last_step(runs.iterations[runs.iterations["iteration"] == 1])
    keys = ["run", "prompt_id"]
    first = begun.set_index(keys)["oracle_error_max"]
    prompts = runs.prompts.set_index(keys)
    rate = prompts["rate"].where(prompts["rate"].between(0, 1, inclusive="neither"))
    shrinks = (first.where(first > 0) / prompts["reporting_tolerance"]).reindex(prompts.index)
    predicted: pd.Series = 1 - np.log(shrinks) / np.log(rate)
    return predicted.where(np.isfinite(predicted)).clip(lower=1).rename("predicted")
