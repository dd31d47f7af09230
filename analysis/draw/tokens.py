"""Single tokens: what a model thinks of each, with feedback and without, and as a text grows."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.draw import style
from analysis.labels import SEEDS, fed, strength_text
from analysis.runs import Runs, last_step
from analysis.text import short, visible

MOST_ROWS = 11
MOST_TOKENS = 48
MOST_SHOWN = 110  # tokens of a text that is written out
LINE = 112  # characters
SEEN = 1e-3  # nats: smaller changes are none
SURPRISED = 8.0  # nats: the darkest colour of a token
SURPRISE = LinearSegmentedColormap.from_list("surprise", ["#ffffff", "#d9c9e6", "#9a79bd"])
MONO: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": 8.5}


@style.house_style()
def tokens(runs: Runs) -> Figure:
    """Change of each token's estimate from the plain model, and the text before and after.

    By strength, or of a single run by pass; of what changes most: kind of run, text, and run.
    """
    if runs.estimates.empty:
        raise style.NotDrawn("no trajectory was kept, so no single tokens")
    last = last_step(runs.estimates)
    facets, _ = style.facets(runs, least=2, most=len(runs.runs))
    told = last["change"].where(last["run"].map(fed(runs.runs)))  # a plain run tells of no change
    change = told.abs().groupby(last["run"]).mean()
    sizes = pd.Series({name: change.reindex(one.index).mean() for name, one in facets.items()})
    facet = facets[str(sizes.idxmax())] if sizes.notna().any() else None
    if facet is not None:
        last = last[last["run"].isin(facet.index)]
    elif told.isna().all():  # no pass of the plain model: since the first one then
        last = last.assign(change=last["last"] - last["first"], plain=last["first"])
    moved = last["change"].abs().groupby([last["prompt_id"].astype(str), last["run"]]).mean()
    if moved.dropna().empty:
        raise style.NotDrawn("no estimate of a token is a number from its first pass to its last")
    prompt_id = str(moved.groupby(level=0).mean().idxmax())
    run = int(str(moved[prompt_id].idxmax()))
    label = str(runs.runs.at[run, "label"])
    last = last[last["prompt_id"] == prompt_id].sort_values("position")
    after = last[last["run"] == run]
    before, origin = after.assign(last=after["plain"]), "the first pass"
    if facet is None:
        what = f"since {origin}, after later ones ({label})"
        rows = _by_pass(runs, run, prompt_id)
    else:
        origin = "the plain model"
        variant = facet["variant"].iloc[0]
        apart = last.groupby("position")["token"].nunique().max() > 1
        what = f"from {origin}, by strength{f' ({variant})' if variant else ''}"
        what += ", where all runs read the same token" if apart else ""
        rows = _by_strength(last, facet)
        seeds = facet.reindex(columns=[*SEEDS]).astype(str)
        plain = facet.index[(seeds == seeds.loc[run]).all(axis=1) & ~fed(facet)]
        read = last[last["run"].isin(plain[:1])]
        before = before if read.empty else read  # what it reads, or wrote with the same seeds
    cut = ""
    if len(rows.columns) > MOST_TOKENS:
        cut = f" Of {len(rows.columns)} tokens, the {MOST_TOKENS} in a row that change most."
        end = int(np.nanargmax(rows.abs().sum().rolling(MOST_TOKENS).sum())) + 1
        rows = rows.iloc[:, end - MOST_TOKENS : end]
    texts = {f"Before: {origin}": _placed(before), f"After: {label}": _placed(after)}
    lines = [placed[-1][0] + 1 for placed in texts.values()]
    heights = [max(0.34 * len(rows), 1.4) + 1.0, *(0.27 * count + 0.3 for count in lines)]
    title = f"What feedback makes of each token: {_quoted(prompt_id)}"
    caption = (
        f"Top: change of a token's log-probability {what}; warm: less expected, blue: more."
        f"{cut} Below: the text as {origin} sees it, and as {label} does; the darker a token, the "
        f"less it is expected ({SURPRISED:g} nats and more are darkest)."
    )
    size = (11.0, 1.3 + sum(heights))
    figure, grid = style.sheet(title, caption, size, shape=(3, 1), height_ratios=heights)
    _heat_map(grid[0, 0], rows, after.set_index("position")["token"])
    for axes, count, (title, placed) in zip(grid[1:, 0], lines, texts.items(), strict=True):
        axes.set(title=style.drawable(title), xlim=(0, LINE), ylim=(count, 0))
        axes.axis("off")
        for row, at, shown, value in placed:
            colour = SURPRISE(np.nan_to_num(-value / SURPRISED))
            place, width = (at + 0.06, row + 0.06), len(shown) - 0.12
            axes.add_patch(Rectangle(place, width, 0.88, color=colour, linewidth=0))
            middle = (at + len(shown) / 2, row + 0.54)
            axes.text(*middle, shown, ha="center", va="center", color=style.INK, **MONO)
    return figure


def _by_strength(last: pd.DataFrame, facet: pd.DataFrame) -> pd.DataFrame:
    """(strengths, positions) changes, the mean over repeats, where all read the same token."""
    same = last.groupby("position")["token"].transform("nunique") == 1
    strength = last["run"].map(facet["strength"]).rename("strength")
    wide = last[same].pivot_table(index=strength, columns="position", values="change")
    wide = style.evenly(wide.iloc[::-1], MOST_ROWS).dropna(axis=1, how="all")
    if wide.empty:
        raise style.NotDrawn("the runs read texts of one name that have no token in common")
    return wide.rename(index=lambda value: strength_text(facet["kind"].iloc[0], value))


def _by_pass(runs: Runs, run: int, prompt_id: str) -> pd.DataFrame:
    """(passes, positions) changes since the first pass, until nothing moves that can be seen."""
    frame = runs.trajectory
    frame = last_step(frame[(frame["run"] == run) & (frame["prompt_id"] == prompt_id)])
    wide = frame.pivot(index="iteration", columns="position", values="log_prob")
    wide = wide.dropna(axis=1, how="all")
    far = np.flatnonzero(((wide - wide.iloc[-1]).abs() > 0.01).any(axis=1))
    change = (wide - wide.iloc[0]).iloc[1 : max(far.max(initial=0) + 2, 2)]
    if change.empty:
        raise style.NotDrawn("there is one pass, and nothing to set it against")
    return style.evenly(change, MOST_ROWS).rename(index=lambda number: f"pass {number}")


def _quoted(prompt_id: str) -> str:
    return f"“{short(visible(prompt_id, spaces=False), 30)}”"


def _heat_map(axes: Axes, rows: pd.DataFrame, tokens: pd.Series) -> None:
    """(rows, positions) changes; tokens are named by their position."""
    values = rows.to_numpy(dtype=float)
    finite = np.abs(values[np.isfinite(values)])
    # one shared scale, that a single token far out does not wash out
    widest = max(np.quantile(finite, 0.98) if len(finite) else 0.0, SEEN)
    axes.grid(False)
    axes.set_facecolor(style.ABSENT)
    image = axes.imshow(values, aspect="auto", cmap=style.CHANGE, vmin=-widest, vmax=widest)
    axes.set_yticks(range(len(rows)), rows.index)
    names = [style.drawable(short(visible(str(tokens[place])), 12)) for place in rows.columns]
    axes.set_xticks(range(len(names)), names, rotation=90, **MONO)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes, extend="both", aspect=18, pad=0.01)
    bar.set_label("Change of the log-\nprobability (nats)")
    bar.outline.set_visible(False)


def _placed(text: pd.DataFrame) -> list[tuple[int, int, str, float]]:
    """Line and column of each token that is written out, with its log-probability."""
    placed: list[tuple[int, int, str, float]] = []
    row = at = 0
    for token, value in zip(text["token"].iloc[:MOST_SHOWN], text["last"], strict=False):
        shown = style.drawable(visible(str(token), spaces=False))[:40]
        if at + len(shown) > LINE:
            row, at = row + 1, 0
        placed.append((row, at, shown, value))
        at += len(shown)
    return placed + ([(row, at, " …", np.nan)] if len(text) > MOST_SHOWN else [])


@style.house_style()
def generation(runs: Runs) -> Figure:
    """Token by generation step: the change of each estimate since the token's first one."""
    text = ["run", "prompt_id"]
    frame = runs.estimates
    frame = frame[frame.groupby(text, observed=True)["step"].transform("max") > 0]
    if frame.empty:
        raise style.NotDrawn("no run with a trajectory generated a token")
    frame = frame.astype({"prompt_id": str, "last": float}).sort_values("step")
    first = frame.groupby([*text, "position"])["last"].transform("first")
    frame = frame.assign(change=frame["last"] - first)
    moved = frame.groupby(text)["change"].agg(lambda change: change.abs().mean())
    if moved.isna().all():
        raise style.NotDrawn("no estimate of a generated text was recorded")
    most: Any = moved.idxmax()
    run, prompt_id = most
    shown = frame[(frame["run"] == run) & (frame["prompt_id"] == prompt_id)]
    change = shown.pivot(index="step", columns="position", values="change")
    change = change.dropna(axis=1, how="all")
    count = len(change.columns)
    change = change.iloc[:, -MOST_TOKENS:]  # the last tokens are the generated ones
    title = f"How estimates of a token change as the text grows: {_quoted(prompt_id)}"
    if frame["change"].abs().max() < SEEN:  # of cold starts, while the window stands still
        title = f"No estimate of a token changes by {SEEN:g} nats as the text grows"
    caption = (
        "Change of a token's log-probability after a step's last pass since its first one; warm: "
        "less expected than then, blue: more; grey: not yet written, or dropped. "
        f"{runs.runs['label'][run]}: of {len(moved)} runs and texts, what changes most."
        + (f" The last {MOST_TOKENS} of {count} tokens." if count > MOST_TOKENS else "")
    )
    figure, grid = style.sheet(title, caption, size=(11.0, 6.0), shape=(1, 1))
    axes = grid[0, 0]
    written = shown.drop_duplicates("position", keep="last").set_index("position")["token"]
    _heat_map(axes, change, written)
    every = -(-len(change) // 9)
    axes.set_yticks(range(0, len(change), every), change.index[::every])
    axes.set_ylabel("Generation step (tokens written)")
    return figure
