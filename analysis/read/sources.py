"""Any source, read: run folders, model folders, offline W&B runs, and W&B's server.

Knows where saved things lie, not what is in them. A new kind of folder is a reader beside this
file and one line in READERS.
"""

import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from analysis.read import model_folder, run_folder, wandb
from analysis.read.saved import LeftOut, NotData, SavedModel, SavedRun, SourceError

Saved = SavedRun | SavedModel
TRACKER = "wandb"  # beside or in a run folder, it repeats the run
# what a folder holds, whole or not, if it is for this reader
READERS: dict[str, Callable[[Path], Saved]] = {
    model_folder.TRAINING: model_folder.read_training,
    model_folder.SETTINGS: model_folder.read_training,
    model_folder.CONTEST: model_folder.read_contest,
    **dict.fromkeys(run_folder.MARKS, run_folder.read_run),
    "*.wandb": lambda folder: wandb.read_log_file(min(folder.glob("*.wandb"))),
}


def read(sources: Sequence[str]) -> tuple[list[Saved], tuple[LeftOut, ...]]:
    """Everything finished in all sources, and what is not. What lies in several counts once.

    SourceError if a source cannot be read, or all hold nothing.
    """
    found = {(one.place, one.run_id): one for source in sources for one in _read(source)}
    saved = [one for one in found.values() if not isinstance(one, LeftOut)]
    left_out = tuple(one for one in found.values() if isinstance(one, LeftOut))
    if not saved:
        reasons = left_out_line(left_out) if left_out else ""
        raise SourceError(f"{', '.join(sources)}: there is no finished run. {reasons}".strip())
    return saved, left_out


def left_out_line(left_out: Sequence[LeftOut]) -> str:
    """Counts and names the runs that are not data."""
    noun = "run that is" if len(left_out) == 1 else "runs that are"
    names = ", ".join(f"{item.run_id} ({item.reason})" for item in left_out)
    return f"Left out {len(left_out)} {noun} not finished and whole: {names}."


def _read(source: str) -> Sequence[Saved | LeftOut]:
    path = Path(source)
    if source.startswith(wandb.PREFIX):
        return wandb.read_address(source)
    # unlike Path's own, at peace with a name that is too long, and nothing is no folder
    if os.path.isdir(source):
        # a W&B folder by itself, or all that is left of a study, is read where nothing else is
        found = list(_walk(path, TRACKER)) or list(_walk(path, None))
        if not found:
            what = "there is no run folder, no trained model and no W&B run in it"
            raise SourceError(f"{source}: {what}.")
        return found
    if source.endswith(".wandb") and os.path.isfile(source):
        return [_attempt(wandb.read_log_file, path)]
    kinds = "a run folder, a study folder or a .wandb file"
    what = f"this is a file; give {kinds}" if os.path.exists(source) else "there is no such folder"
    raise SourceError(f"{source or repr(source)}: {what}.")


def _walk(
    folder: Path, skipped: str | None, above: frozenset[Path] = frozenset()
) -> Iterator[Saved | LeftOut]:
    """What lies at and below a folder, by name; does not look inside a run."""
    real = folder.resolve()
    if real in above:  # a link back
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield LeftOut(real.name, str(real), error.strerror or "unreadable")
        return
    for mark, reader in READERS.items():
        if fnmatch.filter(names, mark):
            yield _attempt(reader, folder)
            return
    for name in names:
        if os.path.isdir(folder / name) and not name.startswith(".") and name != skipped:
            yield from _walk(folder / name, skipped, above | {real})


def _attempt(read: Callable[[Path], Saved], path: Path) -> Saved | LeftOut:
    try:
        return read(path)
    except NotData as reason:
        real = path.resolve()
        return LeftOut(real.name.removesuffix(".wandb"), str(real), str(reason))
