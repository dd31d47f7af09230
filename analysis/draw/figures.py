"""Every figure that saved runs can fill, drawn and saved.

Knows which figures there are; each family has its own module. A new figure is a function of frames
and a line in FIGURES.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.draw.recurrence import contests, feeds_hidden, recurrence, trainings
from analysis.draw.settling import settling
from analysis.draw.strength import headline, regimes
from analysis.draw.style import NotDrawn, save
from analysis.draw.tokens import generation, tokens
from analysis.output import make_folder
from analysis.read.saved import ALL_PROMPTS
from analysis.runs import Runs
from analysis.text import some

# those of convergence runs, and which runs call for one
FIGURES: dict[str, tuple[Callable[[Runs], Figure], Callable[[Runs], bool]]] = {
    "headline": (headline, lambda runs: True),
    "settling": (settling, lambda runs: True),
    "regimes": (regimes, lambda runs: True),
    "tokens": (tokens, lambda runs: True),
    "generation": (generation, lambda runs: bool((runs.prompts["generated_tokens"] > 0).any())),
    "recurrence": (recurrence, lambda runs: bool(feeds_hidden(runs).any())),
}


def write_figures(runs: Runs, folder: Path, *, command: str) -> Iterator[Path | str]:
    """Draws what these runs can fill: each path when it is written, or why one is not drawn."""
    make_folder(folder)
    stand_in = runs.prompts.loc[runs.prompts["prompt_id"] == ALL_PROMPTS, "run"]
    if 0 < len(stand_in) < len(runs.runs):
        apart = some(list(runs.runs.loc[stand_in, "run_id"]))
        why = "only its history of W&B was kept, which does not tell prompts apart"
        yield f"Not drawn: {apart}: {why}."
        runs = runs.where(runs.runs.index.difference(list(stand_in)))
    for name, draw, rows in _jobs(runs):
        try:
            figure = draw()
        except NotDrawn as reason:
            yield f"Not drawn: {name}: {reason}."
            continue
        yield from save(figure, folder / name, run_ids=list(rows["run_id"]), command=command)


def _jobs(runs: Runs) -> Iterator[tuple[str, Callable[[], Figure], pd.DataFrame]]:
    """Name of a figure, what draws it, and the rows of the runs that it shows."""
    for name, (draw, fits) in FIGURES.items():
        if len(runs.runs) and fits(runs):
            yield name, partial(draw, runs), runs.runs
    if len(runs.models.rows):
        yield "recurrence_trained", partial(trainings, runs.models), runs.models.rows
    if len(runs.contests.rows):
        for target, rows in runs.contests.rows.groupby("target"):
            chosen = runs.contests.where(runs.contests.rows["target"] == target)
            # a saved word must not choose a folder
            name = "".join(one if one.isalnum() else "_" for one in str(target))
            yield f"recurrence_{name}", partial(contests, chosen), rows
