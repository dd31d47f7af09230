"""Single tokens: what a model thinks of each, with feedback and without, and as a text grows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from analysis.draw.style import (
    ABSENT,
    CHANGE,
    INK,
    NotDrawn,
    drawable,
    facets,
    in_house_style,
    name_of,
    sheet,
    token_text,
)
from analysis.labels import strength_text
from analysis.runs import Runs
from analysis.text import visible

MOST_ROWS = 11
MOST_TOKENS = 48
MOST_SHOWN = 110  # tokens of a text that is written out
LINE = 112  # characters
SURPRISED = 8.0  # nats: the darkest colour of a token
SURPRISE = LinearSegmentedColormap.from_list("surprise", ["#ffffff", "#d9c9e6", "#9a79bd"])


@in_house_style
def tokens(runs: Runs) -> Figure:
    """Change of each token's estimate from the plain model, and the text before and after."""
    if runs.estimates.empty:
        raise NotDrawn("no trajectory was kept, so no single tokens")
    last = _last_step(runs.estimates)
    facet = next(iter(facets(runs, least=2)[0].values()), None)
    if facet is None or last["change"].isna().all():
        facet = None
        last = last.assign(change=last["last"] - last["first"], plain=last["first"])
    else:
        last = last[last["run"].isin(facet.index)]
    distance = last["change"].abs()
    moved = distance.groupby(last["prompt_id"].astype(str)).mean()
    if moved.dropna().empty:
        raise NotDrawn("no estimate of a token is a number from its first pass to its last")
    prompt_id = str(moved.idxmax())
    last = last[last["prompt_id"] == prompt_id]
    run = int(str(distance[last.index].groupby(last["run"]).mean().idxmax()))
    label = str(runs.runs.at[run, "label"])
    if facet is None:
        rows = _by_pass(runs, run, prompt_id)
        what = f"since the first pass, after each later one ({label})"
        origin = "the first pass"
    else:
        rows = _by_strength(last, facet)
        origin = "the plain model"
        what = f"from {origin}, at each strength"
        if facet["variant"].iloc[0]:
            what += f" ({facet['variant'].iloc[0]})"
    after = last[last["run"] == run].sort_values("position")
    before = _before(runs, last, after)
    names = after.set_index("position")["token"].astype(str)
    window, cut = _window(rows)
    shown = rows[window]
    texts = (before, after)
    lines = [_lines(text) for text in texts]
    heights = [0.34 * len(shown) + 1.0, *(0.27 * len(block) + 0.3 for block in lines)]
    figure, grid = sheet(
        title=f"How feedback changes what the model thinks of each token: “{name_of(prompt_id)}”",
        caption=(
            f"Top: change of a token's log-probability {what}; warm: more expected, blue: less."
            f"{cut} Below: the text as {origin} sees it, and as {label} "
            "does; the darker a token, the less it is expected "
            f"({SURPRISED:g} nats and more are darkest)."
        ),
        width=11.0,
        height=1.3 + sum(heights),
        rows=3,
        columns=1,
        height_ratios=heights,
    )
    _heat_map(figure, grid[0, 0], shown, [token_text(names[place], 12) for place in window])
    titles = (f"Before: {origin}", f"After: {drawable(label)}")
    for axes, block, title in zip(grid[1:, 0], lines, titles, strict=True):
        axes.set_title(title)
        _write(axes, block)
    return figure


def _last_step(estimates: pd.DataFrame) -> pd.DataFrame:
    steps = estimates.groupby(["run", "prompt_id"], observed=True)["step"]
    return estimates[estimates["step"] == steps.transform("max")]


def _by_strength(last: pd.DataFrame, facet: pd.DataFrame) -> pd.DataFrame:
    """(strengths, positions) changes, the mean over repeats, where all read the same token."""
    same = (
        last.groupby("position")["token"].transform(lambda names: names.astype(str).nunique()) == 1
    )
    strength = last["run"].map(facet["strength"]).rename("strength")
    wide = last[same].pivot_table(index=strength, columns="position", values="change")
    places = np.linspace(0, len(wide) - 1, min(len(wide), MOST_ROWS)).round().astype(int)
    wide = wide.iloc[places[::-1]]
    kind = str(facet["kind"].iloc[0])
    wide.index = pd.Index([strength_text(kind, float(value)) for value in wide.index], name=None)
    return wide.dropna(axis=1, how="all")


def _by_pass(runs: Runs, run: int, prompt_id: str) -> pd.DataFrame:
    """(passes, positions) changes since the first pass, until nothing moves that can be seen."""
    frame = runs.trajectory
    frame = frame[(frame["run"] == run) & (frame["prompt_id"] == prompt_id)]
    frame = frame[frame["step"] == frame["step"].max()]
    wide = frame.pivot(index="iteration", columns="position", values="log_prob").dropna(
        axis=1, how="all"
    )
    far = np.flatnonzero(((wide - wide.iloc[-1]).abs() > 0.01).any(axis=1))
    wide = wide.iloc[: max(int(far[-1]) + 2 if len(far) else 2, 2)]
    change: pd.DataFrame = (wide - wide.iloc[0]).iloc[1:]
    if change.empty:
        raise NotDrawn("there is one pass, and nothing to set it against")
    places = np.linspace(0, len(change) - 1, min(len(change), MOST_ROWS)).round().astype(int)
    change = change.iloc[np.unique(places)]
    change.index = pd.Index([f"pass {number}" for number in change.index])
    return change


def _before(runs: Runs, last: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """The text that the plain model reads, or wrote: token, position, last."""
    without = runs.runs.index[(runs.runs["strength"] == 0) | (runs.runs["kind"] == "none")]
    plain = last[last["run"].isin(without)]
    if len(plain):
        plain = plain[plain["run"] == plain["run"].iloc[0]]
        return pd.DataFrame(plain.sort_values("position"))
    return after.assign(last=after["plain"])


def _window(rows: pd.DataFrame) -> tuple[list[int], str]:
    """The positions that are drawn: of a long text, the stretch that changes most."""
    places = [int(str(place)) for place in rows.columns]
    if len(places) <= MOST_TOKENS:
        return places, ""
    moved = rows.abs().sum().rolling(MOST_TOKENS).sum().to_numpy()
    end = int(np.nanargmax(moved)) + 1
    cut = f" Of {len(places)} tokens, the {MOST_TOKENS} in a row that change most."
    return places[end - MOST_TOKENS : end], cut


def _heat_map(figure: Figure, axes: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    values = rows.to_numpy(dtype=float)
    finite = np.abs(values[np.isfinite(values)])
    # one shared scale, that a single token far out does not wash out
    widest = max(float(np.quantile(finite, 0.98)) if len(finite) else 0.0, 1e-6)
    axes.grid(False)
    axes.set_facecolor(ABSENT)
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        interpolation="nearest",
        cmap=CHANGE,
        vmin=-widest,
        vmax=widest,
    )
    axes.set_yticks(range(len(rows)), list(rows.index))
    size = 8.5 if len(names) > 30 else 9.5
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size, family="DejaVu Sans Mono")
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, extend="both", aspect=18, pad=0.01)
    bar.set_label("Change of the log-\nprobability (nats)")
    bar.outline.set_visible(False)


def _lines(text: pd.DataFrame) -> list[list[tuple[str, float]]]:
    """Lines of tokens with their log-probabilities, at most LINE characters each."""
    lines: list[list[tuple[str, float]]] = [[]]
    room = LINE
    for token, value in zip(text["token"].iloc[:MOST_SHOWN], text["last"], strict=False):
        shown = drawable(visible(str(token), spaces=False))[:40]
        if len(shown) > room:
            lines.append([])
            room = LINE
        lines[-1].append((shown, float(value)))
        room -= len(shown)
    if len(text) > MOST_SHOWN:
        lines[-1].append((" …", float("nan")))
    return lines


def _write(axes: Axes, lines: list[list[tuple[str, float]]]) -> None:
    axes.set(xlim=(0, LINE), ylim=(len(lines), 0))
    axes.axis("off")
    for row, line in enumerate(lines):
        at = 0
        for shown, value in line:
            colour = SURPRISE(min(-value / SURPRISED, 1.0)) if value == value else "#ffffff"
            axes.add_patch(
                Rectangle(
                    (at + 0.06, row + 0.06), len(shown) - 0.12, 0.88, color=colour, linewidth=0
                )
            )
            style: dict[str, Any] = {"fontsize": 8.5, "family": "DejaVu Sans Mono", "color": INK}
            axes.text(at + len(shown) / 2, row + 0.54, shown, ha="center", va="center", **style)
            at += len(shown)


@in_house_style
def generation(runs: Runs) -> Figure:
    """Token by generation step: the change of each estimate since the token's first one."""
    frame = runs.estimates[
        runs.estimates.groupby(["run", "prompt_id"], observed=True)["step"].transform("max") > 0
    ]
    if frame.empty:
        raise NotDrawn("no run with a trajectory generated a token")
    best: tuple[float, int, str, pd.DataFrame] | None = None
    for (run, prompt), part in frame.groupby(["run", "prompt_id"], observed=True):
        values = part.pivot(index="position", columns="step", values="last").dropna(how="all")
        if values.empty:
            continue
        change = values.sub(values.bfill(axis=1).iloc[:, 0], axis=0)
        moved = float(np.nanmean(np.abs(change.to_numpy(dtype=float))))
        if best is None or moved > best[0]:
            best = moved, int(run), str(prompt), change  # type: ignore[call-overload]
    if best is None:
        raise NotDrawn("no estimate of a generated text was recorded")
    _, run, prompt, change = best
    label = str(runs.runs.at[run, "label"])
    part = frame[(frame["run"] == run) & (frame["prompt_id"] == prompt)]
    names = (
        part.sort_values("step")
        .drop_duplicates("position", keep="last")
        .set_index("position")["token"]
    )
    texts = frame.groupby(["run", "prompt_id"], observed=True).ngroups
    dropped = max(len(change) - MOST_TOKENS, 0)  # the last tokens are the generated ones
    change = change.iloc[dropped:]
    figure, grid = sheet(
        title=f"Estimates of a token go on changing as the text grows: “{name_of(prompt)}”",
        caption=(
            "Change of a token's log-probability after a step's last pass since its first one; "
            "warm: more expected than then, blue: less; grey: not yet written. "
            f"{label}: of {texts} runs and texts, what changes most."
            + (f" The last {len(change)} of {len(change) + dropped} tokens." if dropped else "")
        ),
        width=11.0,
        height=6.0,
    )
    axes = grid[0, 0]
    labels = [token_text(str(names[place]), 12) for place in change.index]
    _heat_map(figure, axes, change.T, labels)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    steps = list(change.columns)
    axes.yaxis.set_major_formatter(
        lambda at, _: f"{steps[int(at)]}" if at == int(at) and 0 <= at < len(steps) else ""
    )
    axes.set_ylabel("Generation step (tokens written)")
    return figure
