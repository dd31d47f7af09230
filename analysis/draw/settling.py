"""How the estimates settle: the distance to the exact solution, pass by pass."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.draw import style
from analysis.labels import fed, strength_text
from analysis.runs import Runs, last_step
from analysis.text import some

MEASURES = {
    "oracle_error_max": "Largest distance to the\nexact solution (nats)",
    "step_max": "Largest change since\nthe last pass (nats)",
}
EPS = {"float64": 2.0**-52, "bfloat16": 2.0**-7, "float16": 2.0**-10}
MOST_CURVES = 6  # of one sign
PANEL = 2.6  # inches
ROW = 12  # points: of a name
FLOOR = 0.4  # of the level of rounding: how far a line is drawn into it
USUAL = 10.0  # nats: the size of an estimate that is rounded


@style.house_style()
def settling(runs: Runs) -> Figure:
    """Error by pass, a panel for each sign of the strength, down to the level of rounding."""
    counts = runs.iterations.groupby("run")[[*MEASURES]].count().reindex(runs.runs.index)
    told, strengths = counts.any(axis=1), runs.runs["strength"].fillna(0.0)
    groups, note = style.facets(runs.where(runs.runs.index[told & (strengths != 0)]))
    if not groups:
        raise style.NotDrawn("no run of another strength than 0 recorded an error or a step")
    silent = list(runs.runs.loc[~told & fed(runs.runs), "label"])
    shown = pd.concat(groups.values())
    measure = next((name for name in MEASURES if counts.loc[shown.index, name].all()), None)
    if measure is None:  # one axis has one measure
        raise style.NotDrawn("no measure of errors or steps that every run with feedback recorded")
    signs = [sign for sign in (-1, 1) if (shown["strength"] * sign > 0).any()]
    curves = _curves(runs, shown, measure)
    if curves.empty:
        raise style.NotDrawn("no error is a number")
    dtypes = zip(shown["group"], runs.setting("dtype")[shown.index], strict=True)
    levels = {one: 16 * USUAL * EPS.get(str(name), 2.0**-23) for one, name in dtypes}
    level = min(levels.values())
    # a line ends at its first pass in the rounding, for which a log axis needs a place
    moving = curves[curves["median"] > curves["group"].map(levels)]
    last = moving.groupby("group")["iteration"].max() + 1
    curves = curves[curves["iteration"] <= curves["group"].map(last).fillna(1)]
    passes = int(curves["iteration"].max())
    grew = "max_new_tokens" in shown and (shown["max_new_tokens"] > 0).any()
    title = "How the estimates settle, pass by pass"
    ends = curves.groupby("group")["median"].last()
    if measure == "oracle_error_max" and (ends <= ends.index.map(levels)).all():
        most = "Half of the texts are" if style.texts_of(runs.prompts) > 1 else "The text is"
        title = f"{most} exact but for rounding after {passes} pass{'es' if passes > 1 else ''}"
        title += " of the last step" if grew else ""
    of_a_sign = shown.groupby(["variant", np.sign(shown["strength"])])["strength"].nunique().max()
    thinned = f" Of {of_a_sign} strengths, {MOST_CURVES}." if of_a_sign > MOST_CURVES else ""
    caption = (
        f"Lines: median, shaded: {style.spread_words(runs.prompts)}, of the worst token of a text. "
        f"Grey: no more than rounding (16 units in the last place of {USUAL:g} nats); "
        "lines stop there."
        f"{' Of a text that grew: its last step.' if grew else ''}{thinned}{note}"
        + (f" No error or step was recorded of {some(silent, 4)}." if silent else "")
    )
    shape = (len(groups), len(signs))
    size = (max(1.6 + 4.4 * len(signs), 7.4), 1.6 + (PANEL + 0.8) * len(groups))
    figure, grid = style.sheet(title, caption, size, shape, sharex=True, sharey=True)
    lowest = 0  # rows of names
    reach = max(2 * float(curves["high"].max()), 10 * level) / (level * FLOOR)
    for row, (variant, group) in zip(grid, groups.items(), strict=True):
        shade = style.colours(group["strength"])
        for axes, sign in zip(row, signs, strict=True):
            chosen = group[group["strength"] * sign > 0].drop_duplicates("group")
            rounding = levels[group["group"].iloc[0]]
            axes.axhspan(level * 1e-9, rounding, color="#eeeeee", linewidth=0, zorder=0)
            names: list[tuple[float, float, str, str]] = []
            for _, one in style.evenly(chosen.sort_values("strength"), MOST_CURVES).iterrows():
                ends = curves[curves["group"] == one["group"]].set_index("iteration")
                ends = ends[["median", "low", "high"]].clip(lower=rounding * FLOOR)
                name, colour = strength_text(one["kind"], one["strength"]), shade[one["strength"]]
                style.band(axes, ends, colour)
                names.append((ends.index.max(), -ends["median"].iloc[-1], name, colour))
            lowest = max(lowest, _name(axes, names, rounding * FLOOR, passes))
            side = f"{style.symbol(group)} {'below' if sign < 0 else 'above'} 0"
            style.panel_title(axes, f"{variant}: {side}" if len(groups) > 1 else side, 4.0)
            if not names:
                style.nothing(axes, "no such strength")
            style.log_axis(axes)
            style.pass_axis(axes, 1, passes, label="Pass" if axes in grid[-1] else "")
        row[0].set_ylabel(MEASURES[measure])
    room = ROW * (lowest + 0.8) / (72 * PANEL)  # of a panel, for the names
    grid[0, 0].set_ylim(level * FLOOR / reach ** (room / (1 - room)), level * FLOOR * reach)
    first = levels[shown["group"].iloc[0]]
    grid[0, 0].text(0.6, first, " rounding", va="top", color=style.QUIET, fontsize=8.5)
    return figure


def _name(axes: Axes, names: list[tuple[float, float, str, str]], y: float, passes: int) -> int:
    """Each name below the end of its line; one that would touch another goes a row lower. Where
    lines end together, the names stand in their order. How many rows there are.
    """
    rows: list[float] = []  # where the last name of each row ends
    width = 0.24 * max(passes, 2)
    for end, _, name, colour in sorted(names):
        x = min(max(end, 0.5 + width / 2), max(passes, 2) + 0.5 - width / 2)
        row = next((n for n, taken in enumerate(rows) if x - width / 2 >= taken), len(rows))
        rows[row : row + 1] = [x + width / 2]
        axes.annotate(
            name,
            (x, y),
            xytext=(0, -9 - ROW * row),
            textcoords="offset points",
            color=colour,
            ha="center",
            va="center",
            weight="bold",
        )
    return len(rows)


def _curves(runs: Runs, shown: pd.DataFrame, measure: str) -> pd.DataFrame:
    """group, iteration, median, low, high over the texts and runs of each setting, last step."""
    frame = last_step(runs.iterations.dropna(subset=[measure]))
    wide = frame.pivot(index="iteration", columns=["run", "prompt_id"], values=measure).sort_index()
    # a text that ended early stays where it ended
    filled = wide.ffill().replace(np.inf, np.nan)
    by_group = filled.T.groupby(filled.columns.get_level_values("run").map(shown["group"].get))
    parts = {group: style.spread(part, style.texts_of(frame)) for group, part in by_group}
    curves: pd.DataFrame = pd.concat(parts).dropna()
    curves = curves.rename_axis(["group", "iteration"]).reset_index()
    ran = frame["iteration"].groupby(frame["run"].map(shown["group"].get)).max()
    return curves[curves["iteration"] <= curves["group"].map(ran)]
