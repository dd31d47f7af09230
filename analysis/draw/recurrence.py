"""What hidden states that are fed back do: loss and accuracy by depth, and against compute."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.draw import style
from analysis.labels import strength_text
from analysis.models import QUESTION, Models, at_best_rates, at_full_depth, setting_name, trained
from analysis.runs import Runs, last_step

MOST_LINES = 7
LEAST_KL = 1e-12  # nats: what is less is drawn as that
GREY = "#b5b5b5"
DASHED = (0, (4, 1.5))
LETTERS = 40  # of a line of a name beside the panels, which keep their room
EQUAL = 0.15  # compute that differs by less counts as equal
TARGETS = {"state": "the state is asked for", "half": "only half of it is asked for"}


def feeds_hidden(runs: Runs) -> pd.Series:
    """Which runs feed hidden states back, alone or beside the estimates of tokens."""
    beside = pd.to_numeric(runs.setting("hidden_strength")).fillna(0) != 0
    return (runs.runs["kind"] == "hidden_state") | beside


@style.house_style()
def recurrence(runs: Runs) -> Figure:
    """Change of the loss, and movement, by depth, of runs that feed hidden states back."""
    fed = runs.runs[feeds_hidden(runs)]
    groups = dict(list(fed.groupby("group", sort=False))[:MOST_LINES])
    frame = runs.iterations[runs.iterations["run"].isin(fed.index)]
    carried = frame["run"].map(runs.setting("start") == "carried") & (frame["step"] > 0)
    grew = " Of a text that grew: its last step" if frame["step"].any() else ""
    grew += ", or its first where later ones begin with carried estimates" if carried.any() else ""
    frame = last_step(frame[~carried])  # depth 0 is fed nothing
    if frame.empty or frame["iteration"].max() < 2:
        raise style.NotDrawn("no run that feeds hidden states back made a second pass")
    left_out = fed["group"].nunique() - len(groups)
    title = "What each further pass of hidden-state feedback does"
    caption = (
        "Depth n: n passes that are fed hidden states after one without. Left: loss less that of "
        f"the plain pass; lines: median, shaded: {style.spread_words(frame)}. Right: how far a "
        f"pass moves the predictions; what is below {LEAST_KL:g} nats is drawn there. Circle: the "
        "deepest pass that was trained."
        + (f"{grew}." if grew else "")
        + (f" Settings not shown: {left_out}; --run chooses." if left_out else "")
    )
    figure, grid = style.sheet(title, caption, size=(10.0, 4.8), shape=(1, 2))
    loss, movement = grid[0]
    for colour, same in zip(style.DISTINCT, groups.values(), strict=False):
        known = frame[frame["run"].isin(same.index)].set_index(["iteration", "run", "prompt_id"])
        wide = known[["nll", "kl_step"]].fillna(np.inf).unstack(["run", "prompt_id"])
        # a text that ended early stays where it ended, one that diverged has no value from there on
        wide = wide.set_axis(wide.index - 1).ffill().replace(np.inf, np.nan)
        moved = wide["kl_step"].iloc[1:].clip(lower=LEAST_KL)
        passes = runs.saved[same.index[0]].summary.get("trained_passes")
        deepest = passes - 1 if isinstance(passes, int) else None
        first = same.iloc[0]  # of its seeds: they have one line
        words = (strength_text(first["kind"], first["strength"]), first["variant"])
        label = textwrap.fill(style.drawable(", ".join(filter(None, words))), LETTERS)
        for axes, values in (
            (loss, wide["nll"] - wide["nll"].iloc[0]),
            (movement, moved.set_axis(moved.index - 1).dropna(how="all")),
        ):
            ends = style.spread(pd.DataFrame(values).T, style.texts_of(frame))
            style.band(axes, ends, colour, deepest, label=label)
    loss.axhline(0.0, color=style.INK, linewidth=1.0)
    loss.set_ylabel("Loss above the plain pass (nats/token)")
    if frame["kl_step"].notna().any():
        style.log_axis(movement)
    else:
        style.nothing(movement)
    movement.set_ylabel("KL(depth n ‖ depth n + 1) (nats)")
    for axes in grid[0]:
        style.pass_axis(axes, 0, int(frame["iteration"].max()) - 1, label="Depth n")
    movement.legend(*loss.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@style.house_style()
def trainings(models: Models) -> Figure:
    """Held-out loss by depth, and against the compute of the training, of both families."""
    rows = trained(models).sort_values(["best", "group"], kind="stable")
    settings = list(rows.groupby("group", sort=False))
    shown = settings[:MOST_LINES]
    best = f" The best {MOST_LINES} of {len(settings)} settings." if settings[MOST_LINES:] else ""
    title = "Held-out loss by depth of the recurrence, and for its compute"
    caption = (
        f"Mean and range over {_seeds([len(same) for _, same in shown])}. Left: depth n: n passes "
        "fed with hidden states; circle: the deepest pass that was trained; diamond: T − 1, the "
        "depth of generation; a plain model has depth 0 and is a level. Right: the loss that text "
        f"is generated with against the tokens read, every pass counted.{best}"
    )
    figure, grid = style.sheet(title, caption, size=(12.0, 5.2), shape=(1, 2))
    loss, compute = grid[0]
    deepest = int(models.curves["depth"].max())
    for colour, (_, same) in zip(style.DISTINCT, shown, strict=False):
        curves = models.curves[models.curves["model"].isin(same.index)]
        by_depth = curves.pivot(index="model", columns="depth", values="nll")
        first = same.iloc[0]
        if first["stateful"]:
            loss.plot(deepest + 1, same["generating"].mean(), "D", color=colour, markersize=5)
        else:  # a level
            by_depth = by_depth.reindex(columns=range(deepest + 2)).ffill(axis=1)
        _curve(loss, by_depth, first, colour)
        _against(compute, same["tokens_read"].mean() / 1e6, same["generating"], first, colour)
    style.pass_axis(loss, 0, deepest + (deepest > 0), label="Depth n")
    if deepest:  # behind the depths that were measured, that of generation
        near = [int(tick) for tick in loss.get_xticks() if 0 <= tick < 0.95 * (deepest + 1)]
        loss.set_xticks([*near, deepest + 1], [*map(str, near), "T − 1"])
    loss.set_ylabel("Held-out loss (nats/token)")
    compute.set(xlim=(0, None), xlabel="Tokens read in all passes (millions)")
    compute.set_ylabel("Held-out loss when generating (nats/token)")
    compute.xaxis.set_major_locator(MaxNLocator(6))
    compute.legend(*loss.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@style.house_style()
def contests(models: Models) -> Figure:
    """Accuracy by level, by depth, and against compute, of contestants; a row a question."""
    models = at_best_rates(models)
    questions = list(models.rows.groupby(QUESTION, sort=False))
    target = models.rows["target"].iloc[0]
    counts = models.rows.groupby([*QUESTION, "group"]).size()
    title = f"Who follows a state, where {TARGETS.get(target, target)}"
    caption = (
        f"Mean and range over {_seeds(list(counts))}. In colour: stateful (solid), and plain ones "
        "(dashed) with as many evaluations of a layer; grey: plain ones with another compute. "
        "Level: symbols read; dashed: longest trained word; dotted: chance. Depth: passes fed "
        "with hidden states, mean over levels; circle: the deepest trained pass."
    )
    size = (13.0, 1.9 + 3.4 * len(questions))
    figure, grid = style.sheet(title, caption, size, shape=(len(questions), 3))
    for row, (_, group) in zip(grid, questions, strict=True):
        _contest(row, models, group)
    return figure


def _contest(row: Sequence[Axes], models: Models, group: pd.DataFrame) -> None:
    levels, depths, compute = row
    one, accuracy = group.iloc[0], at_full_depth(models)
    tested = one["tested_level"]
    costs = group["layer_passes"].astype(float)
    stateful = group["stateful"].astype(bool)
    # where all are plain, there is none whose compute another could have
    equal = [abs(costs / cost - 1) <= EQUAL for cost in costs[stateful]] or [~stateful]
    coloured = stateful | np.any(equal, axis=0)
    palette = iter(style.DISTINCT)
    for _, same in group.groupby("group", sort=False):
        first = same.iloc[0]
        colour = next(palette, style.INK) if coloured[same.index].any() else GREY
        by_level = accuracy.loc[same.index].dropna(axis=1)
        _curve(levels, by_level, first, colour, mark=False)
        if first["stateful"]:
            curves = models.curves[models.curves["model"].isin(same.index)]
            by_depth = curves.pivot_table(index="model", columns="depth", values="accuracy")
            _curve(depths, by_depth, first, colour)
        _against(compute, costs[same.index].mean(), by_level[tested], first, colour)
    levels.axvline(one["trained_level"], color=style.QUIET, linewidth=1.0, linestyle="dashed")
    levels.set_title(f"{style.drawable(one['task'])}: by level")
    style.pass_axis(levels, 1, tested, label="Level (symbols read)")
    depths.set_title("by depth of the recurrence")
    style.pass_axis(depths, 0, max(tested - 1, 1), label="Depth (passes with feedback)")
    compute.set(title=f"level {tested} against compute", xlabel="Evaluations of a layer (per word)")
    compute.xaxis.set_major_locator(MaxNLocator(5))
    for axes in row:
        axes.set(ylabel="Accuracy", ylim=(0.0, 1.03))
        axes.axhline(one["chance"], color=style.INK, linewidth=1.0, linestyle="dotted")
    compute.legend(*levels.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 1))


def _curve(
    axes: Axes, values: pd.DataFrame, model: pd.Series, colour: str, *, mark: bool = True
) -> None:
    """Mean and range of (seeds, depths or levels); a circle at the deepest trained pass."""
    ends = values.astype(float).agg(["mean", "min", "max"]).T
    name = textwrap.fill(style.drawable(setting_name(model)), LETTERS)
    dash = "solid" if model["stateful"] else DASHED
    deepest = model["trained_depth"] if mark else None
    style.band(axes, ends, colour, deepest, linestyle=dash, label=name if colour != GREY else None)


def _against(axes: Axes, cost: float, values: pd.Series, model: pd.Series, colour: str) -> None:
    """Mean and range over seeds, at what they cost."""
    ends = values.astype(float).agg(["mean", "min", "max"])
    style.whisker(axes, cost, ends, colour, "D" if model["stateful"] else "s")


def _seeds(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least if least == most else f'{least} to {most}'} seed{'s' if most > 1 else ''}"
