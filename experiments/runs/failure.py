"""What a runner says of a run that broke off: one sentence, whichever run it was."""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.runs.folder import RunFolder


def record_failure(error: BaseException, folder: RunFolder, *, shorten: str) -> str:
    """Write into a run's status why it broke off, and return that for its user.

    Args:
        shorten: the setting that makes a run smaller.
    """
    message = _why(error, folder.path, shorten=shorten)
    try:
        folder.fail(message)
    except OSError:
        warn(f"{folder.path / 'status.json'} could not be written either")
    return message


def _why(error: BaseException, folder: Path, *, shorten: str) -> str:
    if isinstance(error, OSError):
        return disk_sentence(error, folder)
    if isinstance(error, (KeyboardInterrupt, SystemExit)):  # Slurm's jobs exit to be queued again
        return "interrupted"
    if isinstance(error, torch.OutOfMemoryError):
        return f"the device's memory does not hold the run: use a shorter {shorten}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def disk_sentence(error: OSError, folder: Path) -> str:
    """That a file of the run cannot be written."""
    place = error.filename or folder
    return f"runs_dir: {str(place)!r} cannot be written ({error.strerror or error})"


def no_locks(folder: Path) -> str:
    """That nothing keeps two processes apart."""
    return f"{folder} is where files have no locks: never start a run twice"


def warn(message: str) -> None:
    """A line on the terminal that leaves a progress bar whole."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
