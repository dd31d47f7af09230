"""Every figure that a set of runs can fill, drawn and saved.

Knows which figures there are and what each needs; each family of figures has its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib

from analysis.figures.convergence import convergence, settled_front
from analysis.figures.drawing import Drawing, Skipped, save
from analysis.figures.generation import generation
from analysis.figures.response import response
from analysis.figures.strength_map import strength_map
from analysis.figures.style import SETTINGS
from analysis.figures.text import visible
from analysis.figures.tokens import heat_map, most_moved, trajectories
from analysis.load import Runs
from analysis.series import Series, series_of

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
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change the bytes
        matplotlib.rcParams.update(SETTINGS)
        named = tuple(
            replace(
                one,
                label=visible(one.label, spaces=False),
                variant=visible(one.variant, spaces=False),
            )
            for one in series_of(runs)
        )
        for drawn in _draw(runs, named):
            if isinstance(drawn, Skipped):
                tell(drawn)
                continue
            for path in save(drawn, folder, command=command):
                tell(path)


def _draw(runs: Runs, series: tuple[Series, ...]) -> Iterator[Drawing | Skipped]:
    for draw in STUDY_FIGURES:
        yield draw(runs, series)
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
