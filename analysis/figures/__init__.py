"""Every figure that a set of runs can fill, drawn and saved.

Knows which figures there are and what each needs; each family of figures has its own module.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    with _house_style():
        for drawn in _draw(runs, _named_series(runs)):
            if isinstance(drawn, Skipped):
                tell(drawn)
                continue
            for path in save(drawn, folder, command=command):
                tell(path)


def heat_map_png(runs: Runs) -> bytes:
    """The heat map of the first prompt of a single run, as a tracker shows it."""
    with _house_style():
        (one,) = _named_series(runs)
        prompt_id = runs.prompt_ids[0]
        drawn = heat_map(runs, one, prompt_id, runs.grid(one.run, prompt_id), among=1)
        assert isinstance(drawn, Drawing)
        content = io.BytesIO()
        drawn.figure.savefig(content, format="png", dpi=90)  # small: it is drawn for every run
    return content.getvalue()


@contextmanager
def _house_style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change the bytes
        matplotlib.rcParams.update(SETTINGS)
        yield


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
