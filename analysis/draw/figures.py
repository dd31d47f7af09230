"""Every figure that saved runs can fill, drawn and saved.

Knows which figures there are; each family has its own module. A new figure is a function of frames
and a line in FIGURES.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

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


def write_figures(
    runs: Runs,
    folder: Path,
    *,
    command: str,
    tell: Callable[[str], None],
    complain: Callable[[str], None],
) -> None:
    """Draws what these runs can fill: `tell` hears each path, `complain` why one is not drawn."""
    make_folder(folder)
    stand_in = runs.prompts.loc[runs.prompts["prompt_id"] == ALL_PROMPTS, "run"]
    if 0 < len(stand_in) < len(runs.runs):
        apart = some(list(runs.runs.loc[stand_in, "run_id"]))
        why = "only its measures over all prompts were kept, which do not compare with prompts"
        complain(f"Not drawn: {apart}: {why}.")
        runs = runs.where(runs.runs.index.difference(list(stand_in)))
    jobs: list[tuple[str, Callable[[], Figure], list[str]]] = []
    if len(runs.runs):
        ids = list(runs.runs["run_id"])
        for name, (draw, fits) in FIGURES.items():
            if fits(runs):
                jobs.append((name, partial(draw, runs), ids))
    if len(runs.models.rows):
        ids = list(runs.models.rows["run_id"])
        jobs.append(("recurrence_trained", partial(trainings, runs.models), ids))
    for target, rows in runs.contests.rows.groupby("target") if len(runs.contests.rows) else ():
        chosen = runs.contests.where(runs.contests.rows["target"] == target)
        jobs.append((f"recurrence_{target}", partial(contests, chosen), list(rows["run_id"])))
    for name, make, ids in jobs:
        try:
            figure = make()
        except NotDrawn as reason:
            complain(f"Not drawn: {name}: {reason}.")
            continue
        for path in save(figure, folder / name, run_ids=ids, command=command):
            tell(str(path))
