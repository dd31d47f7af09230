"""What hidden states that are fed back do: loss and accuracy by depth, and against compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from analysis.draw.style import (
    DISTINCT,
    INK,
    QUIET,
    NotDrawn,
    drawable,
    in_house_style,
    mean_and_range,
    middle,
    pass_axis,
    power_text,
    sheet,
    spread_words,
    whisker,
)
from analysis.models import QUESTION, Models, at_best_rates, at_full_depth, trained
from analysis.runs import Runs

MOST_LINES = 7
MOST_DEPTHS = 32  # beyond them, movements are rounding
GREY = "#b5b5b5"
EQUAL = 0.15  # compute that differs by less counts as equal
TARGETS = {"state": "the state is asked for", "half": "only half of it is asked for"}


def feeds_hidden(runs: Runs) -> pd.Series:
    """Which runs feed hidden states back, alone or beside the estimates of tokens."""
    beside = pd.to_numeric(runs.runs.get("hidden_strength", pd.Series(0.0, index=runs.runs.index)))
    return (runs.runs["kind"] == "hidden_state") | (beside.fillna(0) != 0)


@in_house_style
def recurrence(runs: Runs) -> Figure:
    """Change of the loss, and movement, by depth, of runs that feed hidden states back."""
    fed = runs.runs[feeds_hidden(runs)]
    groups = dict(list(fed.groupby("group", sort=False))[:MOST_LINES])
    frame = runs.iterations[runs.iterations["run"].isin(fed.index)]
    frame = frame[frame["step"] == frame.groupby(["run", "prompt_id"])["step"].transform("max")]
    frame = frame[frame["iteration"] <= MOST_DEPTHS + 1]
    if frame["iteration"].max() < 2 or frame.empty:
        raise NotDrawn("no run that feeds hidden states back made a second pass")
    texts = frame["prompt_id"].nunique()
    left_out = fed["group"].nunique() - len(groups)
    figure, grid = sheet(
        title="What each further pass of hidden-state feedback does",
        caption=(
            "Depth n: n passes that are fed hidden states after one without. Left: loss less that "
            f"of the plain pass; lines: median, shaded: {spread_words(texts)}. Right: "
            "how far a pass moves the predictions. Circle: the deepest pass that was trained."
            + (f" {left_out} more settings are not shown; --run chooses." if left_out else "")
        ),
        width=10.0,
        height=4.8,
        columns=2,
    )
    deepest = 1
    for colour, same in zip(DISTINCT, groups.values(), strict=False):
        label = drawable(same["label"].iloc[0])
        depth = _trained(runs, int(same.index[0]))
        for axes, measure in zip(grid[0], ("nll", "kl_step"), strict=True):
            wide = frame[frame["run"].isin(same.index)].pivot(
                index="iteration", columns=["run", "prompt_id"], values=measure
            )
            wide = wide.ffill()  # a text that ended early stays where it ended
            wide = wide - wide.iloc[0] if measure == "nll" else wide.dropna(how="all")
            spreads = [middle(values.dropna()) for _, values in wide.iterrows()]
            at = np.array(spreads)
            depths = wide.index.to_numpy() - (1 if measure == "nll" else 2)
            positive = at if measure == "nll" else np.maximum(at, 1e-12)
            axes.fill_between(
                depths, positive[:, 1], positive[:, 2], color=colour, alpha=0.15, linewidth=0
            )
            axes.plot(depths, positive[:, 0], color=colour, label=label)
            mark = np.flatnonzero(depths == depth) if depth is not None else ()
            axes.plot(depths[mark], positive[mark, 0], "o", color=colour) if len(mark) else None
            deepest = max(deepest, int(depths[-1]))
    loss, movement = grid[0]
    loss.axhline(0.0, color=INK, linewidth=1.0)
    loss.set_ylabel("Loss above the plain pass (nats/token)")
    movement.set_yscale("log")
    movement.yaxis.set_major_formatter(FuncFormatter(power_text))
    movement.yaxis.set_minor_locator(NullLocator())
    movement.set_ylabel("KL(depth n ‖ depth n + 1) (nats)")
    for axes in grid[0]:
        pass_axis(axes, 0, deepest, label="Depth n")
    movement.legend(loc="upper right")
    return figure


def _trained(runs: Runs, run: int) -> int | None:
    passes = runs.saved[run].summary.get("trained_passes")
    return passes - 1 if isinstance(passes, int) else None


@in_house_style
def trainings(models: Models) -> Figure:
    """Held-out loss by depth, and against the compute of the training, of both families."""
    rows = models.rows.join(trained(models))
    best = rows["generating"].groupby(rows["group"]).transform("mean")
    rows = rows.assign(best=best).sort_values(["best", "group"], kind="stable")
    names = list(dict.fromkeys(rows["group"]))
    shown = rows[rows["group"].isin(names[:MOST_LINES])]
    seeds = shown.groupby("group").size()
    figure, grid = sheet(
        title="Held-out loss by depth of the recurrence, and for its compute",
        caption=(
            f"Mean and range over {_seeds(seeds)}. Left: depth n: n passes fed with hidden states; "
            "circle: the deepest pass that was trained; diamond: T − 1, the depth of generation; a "
            "plain model has depth 0 and is a level. Right: the loss that text is generated with "
            "against the tokens read, every pass counted."
            + (
                f" The best {MOST_LINES} of {len(names)} settings."
                if len(names) > MOST_LINES
                else ""
            )
        ),
        width=12.0,
        height=5.2,
        columns=2,
    )
    loss, compute = grid[0]
    deepest = int(models.curves["depth"].max())
    handles = []
    for colour, (_, same) in zip(DISTINCT, shown.groupby("group", sort=False), strict=False):
        stateful = bool(same["stateful"].iloc[0])
        label = drawable(same["variant"].iloc[0] or ("stateful" if stateful else "plain"))
        curve = models.curves[models.curves["model"].isin(same.index)].groupby("depth")["nll"]
        mean, low, high = (curve.agg(how) for how in ("mean", "min", "max"))
        if stateful:
            loss.fill_between(mean.index, low, high, color=colour, alpha=0.18, linewidth=0)
            loss.plot(mean.index, mean, color=colour)
            depth = same["trained_depth"].iloc[0]
            if depth in mean.index:
                loss.plot(depth, mean[depth], "o", color=colour)
            full = same["generating"].astype(float)
            loss.plot(deepest + 1, full.mean(), "D", color=colour, markersize=5)
        else:
            loss.axhspan(low[0], high[0], color=colour, alpha=0.18, linewidth=0)
            loss.axhline(mean[0], color=colour, linestyle=(0, (5, 1.5)))
        generating = same["generating"].astype(float)
        millions = same["tokens_read"].astype(float).mean() / 1e6
        mark = "D" if stateful else "s"
        whisker(compute, millions, mean_and_range(generating), colour, mark)
        style: Any = "solid" if stateful else (0, (5, 1.5))
        handles.append(Line2D([], [], color=colour, linestyle=style, label=label))
    pass_axis(loss, 0, deepest + (1 if deepest else 0), label="Depth n")
    loss.set_ylabel("Held-out loss (nats/token)")
    compute.set_xlim(left=0)
    compute.xaxis.set_major_locator(MaxNLocator(6))
    compute.set_xlabel("Tokens read in all passes (millions)")
    compute.set_ylabel("Held-out loss when generating (nats/token)")
    figure.legend(handles=handles, loc="outside upper right", ncols=1 if len(handles) < 4 else 2)
    return figure


def _seeds(counts: pd.Series) -> str:
    least, most = counts.min(), counts.max()
    return f"{least if least == most else f'{least} to {most}'} seed{'s' if most > 1 else ''}"


@in_house_style
def contests(models: Models) -> Figure:
    """Accuracy by level, by depth, and against compute, of contestants; a row a question."""
    models = at_best_rates(models)
    questions = list(models.rows.groupby(QUESTION, sort=False))
    target = str(models.rows["target"].iloc[0])
    counts = models.rows.groupby([*QUESTION, "group"]).size()
    figure, grid = sheet(
        title=f"Who follows a state, where {TARGETS.get(target, target)}",
        caption=(
            f"Mean and range over {_seeds(counts)}. In colour: stateful (solid), and plain "
            "ones (dashed) with as many evaluations of a layer; grey: plain ones with another "
            "compute. Level: symbols read; dashed: longest trained word; dotted: chance. Depth: "
            "passes fed with hidden states, mean over levels; circle: the deepest trained pass."
        ),
        width=13.0,
        height=1.9 + 3.4 * len(questions),
        rows=len(questions),
        columns=3,
    )
    for row, (_, group) in zip(grid, questions, strict=True):
        _contest(row, models, group)
    return figure


def _contest(row: np.ndarray, models: Models, group: pd.DataFrame) -> None:
    one = group.iloc[0]
    levels, depths, compute = row
    accuracy = at_full_depth(models)
    stateful = group[group["stateful"].astype(bool)]["layer_passes"].astype(float).unique()
    palette = iter(DISTINCT)
    for _, same in group.groupby("group", sort=False):
        cost = same["layer_passes"].astype(float).mean()
        is_stateful = bool(same["stateful"].iloc[0])
        chosen = is_stateful or any(abs(cost / other - 1) <= EQUAL for other in stateful)
        colour = next(palette, INK) if chosen else GREY
        dash = "solid" if is_stateful else (0, (4, 1.5))
        label = drawable(same["variant"].iloc[0] or same["run_id"].iloc[0])
        by_level = accuracy.loc[same.index].dropna(axis=1)
        _band(levels, by_level, colour, dash, label if chosen else None)
        if is_stateful:
            curves = models.curves[models.curves["model"].isin(same.index)]
            by_depth = curves.pivot_table(index="model", columns="depth", values="accuracy")
            _band(depths, by_depth, colour, dash, None)
            depth = same["trained_depth"].iloc[0]
            if depth in by_depth:
                depths.plot(depth, by_depth[depth].mean(), "o", color=colour)
        most = by_level[int(one["tested_level"])]
        mark = "D" if is_stateful else "s"
        whisker(compute, cost, mean_and_range(most), colour, mark)
    levels.axvline(one["trained_level"], color=QUIET, linewidth=1.0, linestyle="dashed")
    levels.set_title(f"{drawable(str(one['task']))}: by level")
    pass_axis(levels, 1, int(one["tested_level"]), label="Level (symbols read)")
    depths.set_title("by depth of the recurrence")
    pass_axis(depths, 0, max(int(one["tested_level"]) - 1, 1), label="Depth (passes with feedback)")
    compute.set_title(f"level {one['tested_level']} against compute")
    compute.set_xlabel("Evaluations of a layer (per word)")
    compute.xaxis.set_major_locator(MaxNLocator(5))
    for axes in row:
        axes.set_ylim(0.0, 1.03)
        axes.axhline(float(one["chance"]), color=INK, linewidth=1.0, linestyle="dotted")
        axes.set_ylabel("Accuracy")
    if levels.get_legend_handles_labels()[0]:
        compute.legend(
            *levels.get_legend_handles_labels(),
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            fontsize=8.0,
        )


def _band(axes: Axes, table: pd.DataFrame, colour: str, dash: object, label: str | None) -> None:
    """The mean over rows, shaded from the least to the most."""
    axes.fill_between(
        table.columns, table.min(), table.max(), color=colour, alpha=0.15, linewidth=0
    )
    axes.plot(table.columns, table.mean(), color=colour, linestyle=dash, label=label)
