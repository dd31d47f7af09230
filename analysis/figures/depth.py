"""Loss and movement by the depth of the recurrence: what hidden states that are fed back do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator

from analysis.figures.drawing import Drawing, Skipped
from analysis.figures.style import DASHES, DISTINCT, INK, QUIET, LogScale, count_axis, sheet
from analysis.runs import Runs
from analysis.series import Series

MOST_LINES = 10
MOST_DEPTHS = 32  # beyond them, movements are rounding


@dataclass(frozen=True)
class Curve:
    """One line: losses (nats/token) and KL (nats) by depth, a row a seed or prompt.

    Attributes:
        nll: (N, depths); a plain model has one depth.
        kl: (N, depths - 1), from depth n to n + 1.
        full: (N,) at depth T - 1, or nothing.
        trained: the depth of the last trained pass, where it is known.
    """

    label: str
    nll: np.ndarray
    kl: np.ndarray
    full: np.ndarray
    trained: int | None


def feeds_hidden(runs: Runs, one: Series) -> bool:
    """Whether a run feeds hidden states back, alone or beside the estimates of tokens."""
    beside = runs.runs.loc[one.run].get("hidden_strength")
    return one.kind == "hidden_state" or (isinstance(beside, int | float) and beside != 0)


def depth_of_runs(runs: Runs, series: tuple[Series, ...]) -> Drawing | Skipped:
    """Loss and KL by depth of runs that feed hidden states back; the mean over prompts."""
    made = [(one, curve_of(runs, one)) for one in series]
    several = [(one, curve) for one, curve in made if curve.nll.shape[1] > 1]
    if not several:
        return Skipped("depth", "no run that feeds hidden states back made a second pass")
    shown = several[:MOST_LINES]
    note = "Mean over prompts at the last generation step."
    if len(several) > MOST_LINES:
        note += f" The first {MOST_LINES} of {len(several)} runs; --run chooses others."
    ids = tuple(one.run_id for one, _ in shown)
    return draw_depths([curve for _, curve in shown], note=note, run_ids=ids, band=False)


def draw_depths(
    curves: Sequence[Curve], *, note: str, run_ids: tuple[str, ...], band: bool
) -> Drawing:
    """Two panels side by side; ``band`` shades from the smallest to the largest row."""
    title = "What each further pass of hidden-state feedback does"
    any_full = any(len(curve.full) for curve in curves)
    stateful = [curve for curve in curves if curve.nll.shape[1] > 1]
    caption = (
        "Depth n: n passes that are fed hidden states after one without; depth 0 is a plain pass. "
        "Circle: the deepest pass that was trained. "
        + ("Diamond at T − 1: the depth of generation. " if any_full else "")
        + ("Dashed level: a plain model. " if len(stateful) < len(curves) else "")
        + "A low flat stretch is rounding. "
        + note
    )
    longest = max(len(curve.label) for curve in curves)
    figure, grid = sheet(
        title=title,
        caption=caption,
        width=9.0 + 0.075 * longest,
        height=4.6,
        columns=2,
        legend=0.7 + 0.075 * longest,
    )
    loss, movement = grid[0]
    deepest = max(curve.nll.shape[1] for curve in curves) - 1
    scale = LogScale.over(np.concatenate([curve.kl.mean(axis=0) for curve in stateful]))
    scale.apply(movement)
    handles = []
    for curve in curves:
        if curve in stateful:
            place = stateful.index(curve)
            colour = DISTINCT[place % len(DISTINCT)]
            dash = DASHES[place // len(DISTINCT) % len(DASHES)]
            _draw_stateful(loss, movement, curve, scale, colour, dash, deepest, band=band)
            handles.append(Line2D([], [], color=colour, linestyle=dash))
        else:
            place = len(handles) % len(DASHES[1:])
            dash = DASHES[1:][place]
            loss.axhline(curve.nll.mean(), color=QUIET, linestyle=dash, linewidth=1.3, zorder=1)
            handles.append(Line2D([], [], color=QUIET, linestyle=dash, linewidth=1.3))
    loss.set_ylabel("Held-out loss (nats/token)" if band else "Loss (nats/token)")
    _depth_axis(loss, deepest, full=any_full)
    movement.set_ylabel("KL(depth n ‖ depth n + 1) (nats)")
    count_axis(movement, 0, max(deepest - 1, 1), label="Depth n")
    figure.legend(
        handles,
        [curve.label for curve in curves],
        loc="outside right upper",
        handlelength=2.6,
        labelcolor=INK,
    )
    return Drawing("depth", title, figure, run_ids)


def _draw_stateful(
    loss: Axes,
    movement: Axes,
    curve: Curve,
    scale: LogScale,
    colour: str,
    dash: object,
    deepest: int,
    *,
    band: bool,
) -> None:
    depths = np.arange(curve.nll.shape[1])
    mean = curve.nll.mean(axis=0)
    loss.plot(depths, mean, color=colour, linestyle=dash)
    kl = curve.kl.mean(axis=0)
    movement.plot(depths[:-1], scale.place(kl), color=colour, linestyle=dash)
    if band and len(curve.nll) > 1:
        bounds = curve.nll.min(axis=0), curve.nll.max(axis=0)
        loss.fill_between(depths, *bounds, color=colour, alpha=0.15, linewidth=0)
        positive = np.maximum(curve.kl, 10.0**scale.lowest)
        movement.fill_between(
            depths[:-1], positive.min(axis=0), positive.max(axis=0), color=colour, alpha=0.15,
            linewidth=0,
        )  # fmt: skip
    if curve.trained is not None and curve.trained < len(mean):
        loss.plot(curve.trained, mean[curve.trained], "o", color=colour, markeredgecolor="white")
        if curve.trained < len(kl):
            at = scale.place(kl)[curve.trained]
            movement.plot(curve.trained, at, "o", color=colour, markeredgecolor="white")
    if len(curve.full):
        at = _full_place(deepest)
        loss.plot(
            [depths[-1], at], [mean[-1], curve.full.mean()], color=colour, linewidth=0.8,
            linestyle=(0, (1, 1.5)),
        )  # fmt: skip
        loss.plot(at, curve.full.mean(), "D", color=colour, markersize=5, markeredgecolor="white")


def _full_place(deepest: int) -> float:
    return deepest + max(1.0, 0.15 * deepest)


def _depth_axis(axes: Axes, deepest: int, *, full: bool) -> None:
    count_axis(axes, 0, deepest, label="Depth (passes fed with hidden states)")
    if full:
        at = _full_place(deepest)
        axes.set_xlim(right=at + 0.5)
        places = [*axes.xaxis.get_major_locator()(), at]
        labels = [f"{place:g}" for place in places[:-1]]
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(FixedFormatter([*labels, "T − 1"]))


def curve_of(runs: Runs, one: Series) -> Curve:
    """One run by depth: the mean over its prompts."""
    frame = runs.iterations[runs.iterations["run"] == one.run]
    last = frame["step"] == frame.groupby("prompt_id")["step"].transform("max")
    rows = frame[last & (frame["iteration"] <= MOST_DEPTHS + 1)]
    nll, kl = (
        # a prompt that ended early stays where it ended
        rows.pivot(index="prompt_id", columns="iteration", values=measure).ffill(axis=1).to_numpy()
        for measure in ("nll", "kl_step")
    )
    kl = kl[:, 1:]
    nothing = np.empty(0)
    trained = runs.saved[one.run].summary.get("trained_passes")
    return Curve(
        label=one.label,
        nll=np.nanmean(nll, axis=0, keepdims=True),
        kl=np.nanmean(kl, axis=0, keepdims=True) if kl.size else nothing.reshape(1, 0),
        full=nothing,
        trained=trained - 1 if isinstance(trained, int) else None,
    )
