"""Any source, read: run folders, model folders, offline W&B runs, and W&B's server.

Knows where saved things lie, not what is in them. A new kind of folder is a reader beside this
file and one line in FOLDERS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from analysis.read import model_folder, run_folder, wandb
from analysis.read.saved import Found, LeftOut, NotData, SavedModel, SavedRun, SourceError

TRACKER = "wandb"  # beside or in a run folder, it repeats the run
Read = Callable[[Path], SavedRun | SavedModel]
FOLDERS: tuple[tuple[Callable[[Path], bool], Read], ...] = (
    (model_folder.accepts_training, model_folder.read_training),
    (model_folder.accepts_contest, model_folder.read_contest),
    (run_folder.accepts, run_folder.read_run),
    (wandb.accepts_folder, wandb.read_folder),
)


def read(sources: Sequence[str]) -> Found:
    """Everything finished in all sources. SourceError if one cannot be read, or all hold nothing.

    What lies in several sources counts once.
    """
    found = [_read(source) for source in sources]
    runs = {(run.place, run.run_id): run for one in found for run in one.runs}
    left_out = {item.place: item for one in found for item in one.left_out}
    if not runs:
        reasons = left_out_line(tuple(left_out.values()))
        raise SourceError(f"{', '.join(sources)}: there is no finished run. {reasons}".strip())
    return Found(tuple(runs.values()), tuple(left_out.values()))


def left_out_line(left_out: Sequence[LeftOut]) -> str:
    """Counts and names the runs that are not data."""
    if not left_out:
        return ""
    noun = "run that is" if len(left_out) == 1 else "runs that are"
    names = ", ".join(f"{item.run_id} ({item.reason})" for item in left_out)
    return f"Left out {len(left_out)} {noun} not finished and whole: {names}."


def _read(source: str) -> Found:
    if wandb.accepts_address(source):
        return wandb.read_address(source)
    path = Path(source)
    if path.is_dir():
        return _read_folder(source)
    if source.endswith(".wandb") and path.is_file():
        return _all([path], lambda log: wandb.read_folder(log.parent, log=log))
    if path.exists():
        raise SourceError(
            f"{source}: this is a file; give a run folder, a study folder or a .wandb file."
        )
    raise SourceError(f"{source}: there is no such folder.")


def _read_folder(source: str) -> Found:
    """Everything at and below a folder. SourceError when there is nothing, whole or not."""
    places = list(_places(Path(source), enter_tracker=False))
    # a W&B folder by itself, or all that is left of a study
    places = places or list(_places(Path(source), enter_tracker=True))
    if not places:
        raise SourceError(
            f"{source}: there is no run folder, no trained model and no W&B run in it."
        )
    return _all(places, lambda place: _reader(place)(place))  # type: ignore[misc]


def _all(places: Sequence[Path], read: Read) -> Found:
    runs: list[SavedRun | SavedModel] = []
    left_out: list[LeftOut] = []
    for place in places:
        try:
            runs.append(read(place))
        except NotData as reason:
            real = place.resolve()
            name = real.stem if real.suffix == ".wandb" else real.name
            left_out.append(LeftOut(run_id=name, place=str(real), reason=str(reason)))
    return Found(tuple(runs), tuple(left_out))


def _reader(folder: Path) -> Read | None:
    return next((read for accepts, read in FOLDERS if accepts(folder)), None)


def _places(
    folder: Path, *, enter_tracker: bool, seen: frozenset[Path] = frozenset()
) -> Iterator[Path]:
    """By name; does not look inside a run."""
    real = folder.resolve()
    if real in seen:  # a link back to a folder above
        return
    if _reader(folder) is not None:
        yield folder
        return
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return
    for name in names:
        if not name.startswith(".") and (enter_tracker or name != TRACKER):
            yield from _places(folder / name, enter_tracker=enter_tracker, seen=seen | {real})
