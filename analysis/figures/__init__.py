"""Every figure that a set of runs can fill, drawn and saved.

Knows which figures there are and what each needs; each family of figures has its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np

from analysis.figures.convergence import convergence, settled_front
from analysis.figures.depth import MOST_LINES, Curve, depth_of_runs, draw_depths, feeds_hidden
from analysis.figures.drawing import Drawing, Skipped, save
from analysis.figures.generation import generation
from analysis.figures.picture import png
from analysis.figures.response import response
from analysis.figures.strength_map import strength_map
from analysis.figures.style import SETTINGS
from analysis.figures.text import visible
from analysis.figures.tokens import heat_map, heat_map_content, most_moved, trajectories
from analysis.news import some
from analysis.runs import Runs
from analysis.saved import ALL_PROMPTS
from analysis.series import Series, series_of
from analysis.trainings import Group

MOST_PROMPTS = 4  # a study of hundreds of prompts must not leave hundreds of files
STUDY_FIGURES: tuple[Callable[[Runs, tuple[Series, ...]], Drawing | Skipped], ...] = (
    convergence,
    settled_front,
    response,
    strength_map,
)


def write_figures(
    runs: Runs, folder: Path, *, command: str, tell: Callable[[Path | Skipped], None]
) -> None:
    """Draws what these runs can fill; `tell` hears of every path written and figure skipped."""
    runs, apart = _of_one_kind(runs)
    if apart:
        why = "only their measures over all prompts were kept, which do not compare with prompts"
        tell(Skipped(f"any line of {some(apart)}", why))
    with _house_style():
        for drawn in _draw(runs, _named_series(runs)):
            if isinstance(drawn, Skipped):
                tell(drawn)
                continue
            for path in save(drawn, folder, command=command):
                tell(path)


def write_depths(groups: Sequence[Group], folder: Path, *, command: str) -> list[Path]:
    """Draws held-out loss and KL by depth of trained models; the paths written."""
    curves = [
        Curve(
            label=group.label,
            nll=np.array([one.nll for one in group.trainings]),
            kl=np.array([one.kl for one in group.trainings]),
            full=np.array([one.nll_full for one in group.trainings if one.nll_full is not None]),
            trained=group.trainings[0].trained_depth,
        )
        for group in groups[-MOST_LINES:]
    ]
    seeds = {len(group.trainings) for group in groups}
    note = "Mean over the seeds, shaded from the lowest to the highest."
    if len(seeds) == 1:
        note = note.replace("the seeds", f"{min(seeds)} seeds") if seeds != {1} else "One seed."
    if len(groups) > MOST_LINES:
        note += f" The last {MOST_LINES} of {len(groups)} rows; name others to see them."
    names = tuple(one.name for group in groups[-MOST_LINES:] for one in group.trainings)
    with _house_style():
        drawing = draw_depths(curves, note=note, run_ids=names, band=True)
        return save(drawing, folder, command=command)


def heat_map_png(runs: Runs) -> bytes:
    """The heat map of the first prompt of a single run, as a tracker shows it."""
    (one,) = _named_series(runs)
    prompt_id = runs.prompt_ids[0]
    grid = runs.grid(one.run, prompt_id)
    return png(heat_map_content(runs, one, prompt_id, grid, among=1))


@contextmanager
def _house_style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change the bytes
        matplotlib.rcParams.update(SETTINGS)
        yield


def _of_one_kind(runs: Runs) -> tuple[Runs, tuple[str, ...]]:
    """The runs with prompts of their own if there are any, and the ids of the others."""
    stand_in = runs.summaries["prompt_id"] == ALL_PROMPTS
    if stand_in.all() or not stand_in.any():
        return runs, ()
    apart = runs.summaries["run"][stand_in].unique()
    ids = tuple(runs.runs.loc[apart, "run_id"])
    whole = runs.runs.index.difference(apart)
    frames = {
        name: frame[frame["run"].isin(whole)]
        for name, frame in (
            ("summaries", runs.summaries),
            ("overall", runs.overall),
            ("iterations", runs.iterations),
        )
    }
    return replace(runs, runs=runs.runs.loc[whole], **frames), ids


def _named_series(runs: Runs) -> tuple[Series, ...]:
    return tuple(
        replace(
            one,
            label=visible(one.label, spaces=False),
            variant=visible(one.variant, spaces=False),
        )
        for one in series_of(runs)
    )


def _draw(runs: Runs, series: tuple[Series, ...]) -> Iterator[Drawing | Skipped]:
    for draw in STUDY_FIGURES:
        yield draw(runs, series)
    fed = tuple(one for one in series if feeds_hidden(runs, one))
    if fed:
        yield depth_of_runs(runs, fed)
    if not any(runs.saved[one.run].trajectory for one in series):
        yield Skipped("heat_map and trajectories", "W&B's history holds no single tokens")
        return
    for prompt_id in runs.prompt_ids[:MOST_PROMPTS]:
        chosen = most_moved(runs, series, prompt_id)
        if chosen is None:
            yield Skipped(f"heat_map of {prompt_id}", "its trajectory holds no rows")
            continue
        one, grid = chosen
        yield heat_map(runs, one, prompt_id, grid, among=len(series))
        yield trajectories(runs, one, prompt_id, grid, among=len(series))
        if grid.step > 0:
            yield generation(runs, one, prompt_id, among=len(series))
    rest = runs.prompt_ids[MOST_PROMPTS:]
    if rest:
        yield Skipped(
            f"heat_map and trajectories of {len(rest)} more prompts",
            "they are drawn for the first four; --prompt ID chooses others",
        )
