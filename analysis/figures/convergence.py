"""How a study settles, pass by pass: step size, error to the exact solution, settled front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.drawing import Drawing, Skipped
from analysis.figures.style import INK, QUIET, LogScale, Pen, count_axis, pens, sheet
from analysis.figures.text import opening, prompt_name
from analysis.runs import Runs
from analysis.saved import ALL_PROMPTS
from analysis.series import Series

MOST_PROMPTS = 4
MOST_LINES = 18
GUARANTEE = "Grey: guaranteed by theorem (token j is final from iteration max(j, 1), undamped)."
MEASURES = {
    "step_max": "Step: largest change\nsince the last pass (nats)",
    "oracle_error_max": "Error: largest distance\nto the exact solution (nats)",
}


def convergence(runs: Runs, series: tuple[Series, ...]) -> Drawing | Skipped:
    """Step size and oracle error by iteration, a column of panels per prompt, a line per run."""
    measures = [name for name in MEASURES if runs.iterations[name].notna().any()]
    if not measures:
        return Skipped("convergence", "no run recorded step sizes or oracle errors")
    prompts = runs.prompt_ids[:MOST_PROMPTS]
    drawn = _spread(series)
    title = "How the estimates settle from pass to pass" + _alone(drawn)
    notes = [
        "Lower is more settled. A dot on the grey band: exactly 0 from there on. Dashed vertical "
        "line: by theorem, T − 1 passes always suffice for T tokens (undamped). A low flat stretch "
        "is the rounding of the run's precision.",
        *_choices(runs, prompts, series, drawn),
    ]
    missing = _unrecorded(runs, drawn, measures)
    counts = {prompt_id: _token_counts(runs, prompt_id, drawn) for prompt_id in prompts}
    figure, grid = sheet(
        title=title,
        caption=" ".join(notes + missing),
        width=_width(len(prompts), drawn),
        height=2.0 + 2.35 * len(measures),
        rows=len(measures),
        columns=len(prompts),
        legend=_legend_width(drawn),
    )
    for row, measure in enumerate(measures):
        curves = [_curve(runs, one, prompt, measure)[1] for one in drawn for prompt in prompts]
        scale = LogScale.over(np.concatenate(curves))
        for column, prompt_id in enumerate(prompts):
            axes = grid[row, column]
            if row == 0:
                axes.set_title(_prompt_title(runs, prompt_id))
            if column == 0:
                axes.set_ylabel(MEASURES[measure])
            else:
                axes.tick_params(labelleft=False)
            if row < len(measures) - 1:
                axes.tick_params(labelbottom=False)
            scale.apply(axes)
            _draw_lines(axes, runs, prompt_id, measure, drawn, scale)
            bounds = [count - 1 for count in counts[prompt_id]]
            last = _extent(_reach(runs, prompt_id, drawn), bounds)
            _mark_bounds(axes, bounds, last)
            count_axis(axes, 1, last, label="Iteration (pass)" if row + 1 == len(measures) else "")
    _legend(figure, drawn)
    return Drawing("convergence", title, figure, tuple(one.run_id for one in drawn))


def settled_front(runs: Runs, series: tuple[Series, ...]) -> Drawing | Skipped:
    """Leading settled tokens by iteration, against the front that the theorem guarantees."""
    if not runs.iterations["settled_prefix"].notna().any():
        return Skipped("settled_front", "no run recorded its settled prefix")
    prompts = runs.prompt_ids[:MOST_PROMPTS]
    drawn = _spread(series)
    title = "How many leading tokens have settled after each pass" + _alone(drawn)
    bounded = any(_token_counts(runs, prompt_id, drawn) for prompt_id in prompts)
    notes = [
        "A token counts once it and all before it are within tolerance of their final values.",
        *([GUARANTEE] if bounded else []),
        "A dot: all tokens settled.",
        *_choices(runs, prompts, series, drawn),
        *_unrecorded(runs, drawn, ["settled_prefix"]),
    ]
    figure, grid = sheet(
        title=title,
        caption=" ".join(notes),
        width=_width(len(prompts), drawn),
        height=4.6,
        columns=len(prompts),
        legend=_legend_width(drawn, *(["guaranteed"] if bounded else [])),
    )
    styles = pens(drawn)
    for column, prompt_id in enumerate(prompts):
        axes = grid[0, column]
        axes.set_title(_prompt_title(runs, prompt_id))
        counts = _token_counts(runs, prompt_id, drawn)
        last = _reach(runs, prompt_id, drawn)
        if counts:
            guaranteed = np.arange(1, last + 1)
            front = np.minimum(guaranteed + 1, max(counts))
            axes.fill_between(guaranteed, front, color="#ececec", linewidth=0, zorder=0)
            axes.plot(guaranteed, front, color=QUIET, linewidth=1.0, linestyle=(0, (4, 2)))
        for one in drawn:
            x, y = _curve(runs, one, prompt_id, "settled_prefix")
            if not len(x):
                continue
            pen = styles[one.run]
            count = runs.token_count(one.run, prompt_id)
            walking = np.flatnonzero(y < (np.inf if count is None else count))
            # once all tokens have settled for good, the line ends in a dot
            end = int(walking[-1]) + 1 if len(walking) else 0
            axes.plot(x[: end + 1], y[: end + 1], color=pen.colour, linestyle=pen.dash)
            if end < len(y):
                _dot(axes, float(x[end]), float(y[end]), pen)
        axes.set_ylim(bottom=0)
        count_axis(axes, 1, last, label="Iteration (pass)")
    grid[0, 0].set_ylabel("Settled tokens from the start (count)")
    guarantee = Line2D([], [], color=QUIET, linewidth=1.0, linestyle=(0, (4, 2)))
    _legend(figure, drawn, extra=((guarantee, "guaranteed"),) if bounded else ())
    return Drawing("settled_front", title, figure, tuple(one.run_id for one in drawn))


def _curve(runs: Runs, one: Series, prompt_id: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Recorded values of one run at the last step; a missing value at the start is left out."""
    frame = runs.iterations
    rows = frame[
        (frame["run"] == one.run)
        & (frame["prompt_id"] == prompt_id)
        & (frame["step"] == runs.last_step(one.run, prompt_id))
    ].dropna(subset=[measure])
    return rows["iteration"].to_numpy(), rows[measure].to_numpy()


def _draw_lines(
    axes: Axes,
    runs: Runs,
    prompt_id: str,
    measure: str,
    drawn: Sequence[Series],
    scale: LogScale,
) -> None:
    styles = pens(drawn)
    for one in drawn:
        x, y = _curve(runs, one, prompt_id, measure)
        if not len(x):
            continue
        pen = styles[one.run]
        moving = np.flatnonzero(y != 0)
        # once 0 for good, the line ends in a dot instead of running along the floor
        end = int(moving[-1]) + 2 if len(moving) else 1
        finite = np.isfinite(y)
        shown_x, shown_y = x[:end], scale.place(np.where(finite, y, np.nan))[:end]
        axes.plot(shown_x, shown_y, color=pen.colour, linestyle=pen.dash)
        if end <= len(y) and y[end - 1] == 0:
            _dot(axes, float(x[end - 1]), float(shown_y[-1]), pen)
        if not finite.all():
            before = np.flatnonzero(finite)
            if len(before):
                at = before[-1]
                axes.plot(x[at], scale.place(y)[at], marker="X", color=pen.colour, markersize=8)


def _dot(axes: Axes, x: float, y: float, pen: Pen) -> None:
    axes.plot(x, y, marker="o", color=pen.colour, markersize=5, markeredgecolor="white", zorder=4)


def _token_counts(runs: Runs, prompt_id: str, drawn: Sequence[Series]) -> list[int]:
    """The different text lengths T among undamped runs: tokenizers may differ within a study."""
    having = runs.summaries["run"][runs.summaries["prompt_id"] == prompt_id]
    bounded = [one.run for one in drawn if one.ends_by_theorem and one.run in set(having)]
    return sorted({count for run in bounded if (count := runs.token_count(run, prompt_id))})


def _reach(runs: Runs, prompt_id: str, drawn: Sequence[Series]) -> int:
    frame = runs.iterations
    rows = frame["run"].isin([one.run for one in drawn]) & (frame["prompt_id"] == prompt_id)
    return max(int(frame["iteration"][rows].max()) if rows.any() else 1, 2)


def _extent(reach: int, bounds: Sequence[int]) -> int:
    """The axis grows to show a bound that is near, not one that is far."""
    near = [bound for bound in bounds if bound <= 1.5 * reach + 2]
    return max([reach, *near])


def _mark_bounds(axes: Axes, bounds: Sequence[int], last: int) -> None:
    for bound in bounds:
        seen = bound <= last
        if seen:
            axes.axvline(bound, color=QUIET, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
        axes.text(
            bound if seen else last,
            0.98,
            f"T − 1 = {bound} " if seen else f"T − 1 = {bound} →",
            transform=axes.get_xaxis_transform(),
            ha="right",
            va="top",
            rotation=90 if seen else 0,
            fontsize=7.5,
            color=QUIET,
        )


def _spread(series: tuple[Series, ...]) -> tuple[Series, ...]:
    """At most MOST_LINES, evenly chosen with both ends."""
    if len(series) <= MOST_LINES:
        return series
    places = np.linspace(0, len(series) - 1, MOST_LINES).round().astype(int)
    return tuple(series[place] for place in places)


def _alone(drawn: Sequence[Series]) -> str:
    return f" ({drawn[0].label})" if len(drawn) == 1 else ""


def _choices(
    runs: Runs,
    prompts: Sequence[str],
    series: Sequence[Series],
    drawn: Sequence[Series],
) -> list[str]:
    notes = []
    if ALL_PROMPTS in prompts:
        notes.append("From W&B's history: the largest step and error of all prompts, mean front.")
    if any(runs.last_step(one.run, prompt) > 0 for one in drawn for prompt in prompts):
        notes.append("Generated text: the passes of the last generation step.")
    if len(runs.prompt_ids) > len(prompts):
        total = len(runs.prompt_ids)
        notes.append(f"The first {len(prompts)} of {total} prompts; --prompt chooses others.")
    if len(series) > len(drawn):
        notes.append(f"{len(drawn)} of {len(series)} runs, evenly chosen; --run chooses others.")
    return notes


def _unrecorded(runs: Runs, drawn: Sequence[Series], measures: Sequence[str]) -> list[str]:
    """What a run did not record is said, as its line is not there."""
    notes = []
    for measure in measures:
        recorded = runs.iterations.dropna(subset=[measure])["run"].unique()
        lacking = [one.label for one in drawn if one.run not in recorded]
        if lacking:
            notes.append(f"{measure} was not recorded for {'; '.join(lacking)}.")
    if len(measures) < len(MEASURES) and set(measures) <= set(MEASURES):
        notes.append(f"{', '.join(set(MEASURES) - set(measures))} was not recorded by any run.")
    if not np.isfinite(runs.iterations[list(measures)].fillna(0.0).to_numpy()).all():
        notes.append("A cross: no longer a finite number after it.")
    return notes


def _prompt_title(runs: Runs, prompt_id: str) -> str:
    rows = runs.summaries[runs.summaries["prompt_id"] == prompt_id]
    text = rows["text"].iloc[0]
    name = prompt_name(prompt_id, 18)
    return f"{name}  {opening(text, 34 - len(name))}" if isinstance(text, str) else name


def _legend_width(drawn: Sequence[Series], *extra: str) -> float:
    names = [*extra, *(one.label for one in drawn if len(drawn) > 1)]
    return 0.7 + 0.075 * max(map(len, names)) if names else 0.0


def _width(panels: int, drawn: Sequence[Series]) -> float:
    return max(1.0 + 3.1 * panels, 6.0) + _legend_width(drawn)


def _legend(
    figure: Figure, drawn: Sequence[Series], extra: Sequence[tuple[Line2D, str]] = ()
) -> None:
    styles = pens(drawn)
    lines = [
        (Line2D([], [], color=styles[one.run].colour, linestyle=styles[one.run].dash), one.label)
        for one in drawn
    ]
    entries = [*extra, *(lines if len(drawn) > 1 else [])]
    if entries:
        figure.legend(
            [line for line, _ in entries],
            [text for _, text in entries],
            loc="outside right upper",
            handlelength=2.6,
            labelcolor=INK,
        )
