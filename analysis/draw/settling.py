"""How the estimates settle: the distance to the exact solution, pass by pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.draw.style import (
    QUIET,
    NotDrawn,
    colours,
    drawable,
    facets,
    in_house_style,
    pass_axis,
    power_text,
    quantiles,
    sheet,
    spread_words,
    symbol,
)
from analysis.labels import strength_text
from analysis.runs import Runs

MEASURES = {
    "oracle_error_max": "Largest distance to the\nexact solution (nats)",
    "step_max": "Largest change since\nthe last pass (nats)",
}
EPS = {"float64": 2.0**-52, "bfloat16": 2.0**-8, "float16": 2.0**-10}
MOST_CURVES = 6  # of one sign
FLOOR = 0.4  # of the level of rounding: how far a line is drawn into it
USUAL = 10.0  # nats: the size of an estimate that is rounded


@in_house_style
def settling(runs: Runs) -> Figure:
    """Error by pass, a panel for each sign of the strength, down to the level of rounding."""
    measure = next((name for name in MEASURES if runs.iterations[name].notna().any()), None)
    groups, note = facets(runs)
    if measure is None or not groups:
        raise NotDrawn("no run with feedback recorded errors or steps")
    curves = _curves(runs, measure)
    signs = [
        sign for sign in (-1, 1) if any((g["strength"] * sign > 0).any() for g in groups.values())
    ]
    if not signs:
        raise NotDrawn("no strength differs from 0")
    texts = runs.prompts["prompt_id"].nunique()
    level = max(_rounding(dtype) for dtype in runs.runs.get("dtype", pd.Series(["float32"])))
    drawn = curves[curves["group"].isin([n for group in groups.values() for n in group["group"]])]
    ends = drawn[drawn["median"] > level].groupby("group")["iteration"].max()
    last = int(ends.max()) + 1 if len(ends) else 2
    title = "How the estimates settle, pass by pass"
    if drawn.groupby("group")["median"].last().le(level).all():
        most = "Half of the texts are" if texts > 1 else "The text is"
        title = f"{most} exact but for rounding after {last} passes"
    figure, grid = sheet(
        title=title,
        caption=(
            f"Lines: median, shaded: {spread_words(texts)}, of the worst token of a text. Grey: no "
            f"more than rounding (16 ulp of {USUAL:g} nats), where a line ends.{note}"
        ),
        width=max(1.6 + 4.4 * len(signs), 7.4),
        height=1.6 + 3.4 * len(groups),
        rows=len(groups),
        columns=len(signs),
        sharex=True,
        sharey=True,
    )
    reach = max(2 * float(drawn["high"].max()), 10 * level) / (level * FLOOR)
    for row, (variant, group) in zip(grid, groups.items(), strict=True):
        shade = colours(list(group["strength"]))
        for axes, sign in zip(row, signs, strict=True):
            chosen = (
                group[group["strength"] * sign > 0].drop_duplicates("group").sort_values("strength")
            )
            places = (
                np.linspace(0, len(chosen) - 1, min(len(chosen), MOST_CURVES)).round().astype(int)
            )
            axes.axhspan(level * 1e-9, level, color="#eeeeee", linewidth=0, zorder=0)
            labels: list[tuple[float, str, str]] = []
            for _, one in chosen.iloc[places].iterrows():
                curve = curves[curves["group"] == one["group"]]
                x = _draw(axes, curve, level, shade[one["strength"]])
                labels.append(
                    (x, strength_text(one["kind"], one["strength"]), shade[one["strength"]])
                )
            _name(axes, labels, level * FLOOR, reach, last)
            side = "below 0" if sign < 0 else "above 0"
            prefix = f"{drawable(variant)}: " if len(groups) > 1 else ""
            axes.set_title(f"{prefix}{symbol(group)} {side}")
            axes.set_yscale("log")
            axes.set_ylim(level * FLOOR / reach**0.32, level * FLOOR * reach)
            axes.yaxis.set_major_locator(LogLocator(numticks=8))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(power_text))
            pass_axis(axes, 1, last, label="Pass" if axes in grid[-1] else "")
        row[0].set_ylabel(MEASURES[measure])
    grid[0, 0].text(0.6, level, " rounding", va="top", color=QUIET, fontsize=8.5)
    return figure


def _curves(runs: Runs, measure: str) -> pd.DataFrame:
    """group, iteration, median, low, high over the texts and runs of each setting, last step."""
    frame = runs.iterations.dropna(subset=[measure])
    frame = frame[frame["step"] == frame.groupby(["run", "prompt_id"])["step"].transform("max")]
    wide = frame.pivot(index="iteration", columns=["run", "prompt_id"], values=measure).sort_index()
    # a text that ended early stays where it ended
    filled = wide.ffill().where(wide.notna().cummax())
    filled = filled.replace(np.inf, np.nan)
    by_group = filled.T.groupby(
        runs.runs["group"].reindex(filled.columns.get_level_values("run")).to_numpy()
    )
    edges = (0.5, *quantiles(frame["prompt_id"].nunique()))
    parts = [
        pd.DataFrame({name: by_group.quantile(edge).unstack()})
        for edge, name in zip(edges, ("median", "low", "high"), strict=True)
    ]
    curves: pd.DataFrame = pd.concat(parts, axis=1).dropna()
    curves.index.names = ["iteration", "group"]
    return curves.reset_index()


def _draw(axes: Axes, curve: pd.DataFrame, level: float, colour: str) -> float:
    """One strength down to rounding; returns the pass at which it ends."""
    above = np.flatnonzero(curve["median"] > level)
    end = int(above[-1]) + 2 if len(above) else 1
    shown = curve.iloc[:end].assign(iteration=lambda rows: rows["iteration"].astype(float))
    # a log axis has no place for 0, and below rounding nothing is to be seen
    low, middle, high = (
        shown[name].clip(lower=level * FLOOR) for name in ("low", "median", "high")
    )
    axes.fill_between(shown["iteration"], low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(shown["iteration"], middle, color=colour)
    return float(shown["iteration"].iloc[-1])


def _name(
    axes: Axes, labels: list[tuple[float, str, str]], end: float, reach: float, last: int
) -> None:
    """Names in the grey band, each below the end of its line; the nearest go below one another."""
    rows: list[float] = []  # where the last name of each row ends
    width = 0.22 * max(last, 6)
    for x, text, colour in sorted(labels):
        x = min(max(x, 1 + width / 2), last - width / 4)
        row = next((n for n, end in enumerate(rows) if x - width / 2 > end), len(rows))
        rows[row : row + 1] = [x + width / 2]
        y = end / reach ** (0.05 + 0.07 * row)
        style: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "fontsize": 9,
            "fontweight": "bold",
        }
        axes.text(x, y, text, color=colour, **style)


def _rounding(dtype: object) -> float:
    return 16 * EPS.get(str(dtype), 2.0**-23) * USUAL
