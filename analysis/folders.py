"""Finds the saved runs at and below a folder: run folders, and offline W&B runs.

Knows where runs lie, not what is in them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from analysis import run_folder, wandb_folder
from analysis.saved import Found, LeftOut, NotData, SavedRun, SourceError

TRACKER = "wandb"  # beside or in a run folder, it repeats the run


def accepts(source: str) -> bool:
    return Path(source).is_dir()


def read(source: str) -> Found:
    """All runs under a folder. Raises SourceError when there is none, whole or not."""
    places = list(_places(Path(source), enter_tracker=False))
    # a W&B folder by itself, or all that is left of a study
    places = places or list(_places(Path(source), enter_tracker=True))
    if not places:
        raise SourceError(f"{source}: there is no run folder and no W&B run in it.")
    runs: list[SavedRun] = []
    left_out: list[LeftOut] = []
    for place in places:
        try:
            if run_folder.accepts(place):
                runs.append(run_folder.read_run(place))
            else:
                runs.append(wandb_folder.read_run(place))
        except NotData as reason:
            real = place.resolve()
            left_out.append(LeftOut(run_id=real.name, place=str(real), reason=str(reason)))
    return Found(runs=tuple(runs), left_out=tuple(left_out))


def _places(
    folder: Path, *, enter_tracker: bool, seen: frozenset[Path] = frozenset()
) -> Iterator[Path]:
    """By name; does not look inside a run."""
    real = folder.resolve()
    if real in seen:  # a link back to a folder above
        return
    if run_folder.accepts(folder) or wandb_folder.accepts(folder):
        yield folder
        return
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return
    for name in names:
        if not name.startswith(".") and (enter_tracker or name != TRACKER):
            yield from _places(folder / name, enter_tracker=enter_tracker, seen=seen | {real})
