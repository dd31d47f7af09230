"""One way for every runner to compute a run: once, by one process, with its end written down.

Whatever goes wrong is a sentence in ``status.json``. A mistake of ours keeps its traceback, too.
"""

import math
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from experiments.runs.folder import RunFolder, damage
from experiments.runs.lock import locked
from experiments.runs.provenance import changes, provenance
from experiments.tracking.tracker import Tracker, warn
from stateful_gpt.console import cut, exhausted

if TYPE_CHECKING:
    import torch


class RunError(RuntimeError):
    """A run that broke off; the message is one sentence for the user."""


@dataclass(frozen=True)
class Asked:
    """How a run was asked for."""

    command: str | None = None  # what a user typed, perhaps for a whole sweep
    command_of_this_run: str | None = None
    place: str = ""  # in its sweep, such as ``run 3 of 8``
    bar: bool = True  # whether this process may draw a progress bar

    def progress(self, total: int, unit: str, name: str) -> "tqdm[Any]":
        """A bar for this run, where somebody watches."""
        description = ": ".join(filter(None, (self.place, name)))
        hidden = None if self.bar else True  # None: off where nobody watches
        return tqdm(total=total, unit=unit, desc=description, disable=hidden)


ALONE = Asked()


def finished_already(folder: RunFolder) -> bool:
    """Whether there is nothing to compute, which is said."""
    if not folder.called_finished:
        return False
    if (found := damage(folder.path)) is not None:
        warn(f"{folder.path} is damaged ({found}) and is computed again")
        return False
    folder.tidy()
    print(f"{folder.path} is finished: nothing to compute")
    return True


def compute_once(
    folder: RunFolder,
    *,
    asked: Asked,
    device: "torch.device",
    open_tracker: Callable[[], Tracker],
    compute: Callable[[Tracker], Callable[[], object]],
    shorten: str,
    origin: dict[str, Any] | None = None,
) -> None:
    """Compute a run unless it is finished. Waits for whoever computes it already.

    Args:
        compute: computes the run and writes its files; returns what tells the tracker the rest of
            it, without which the run is safe. It may raise RunError.
        shorten: the setting that makes the run smaller.
        origin: what ``status.json`` says besides of where the results come from.

    Raises:
        RunError: it broke off; ``status.json`` says so too, unless nothing can be written.
    """
    try:
        with locked(folder.path):
            if folder.called_finished and damage(folder.path) is None:
                print(f"{folder.path} was finished meanwhile: nothing to compute")
                return
            found = changes()
            told = {"command": asked.command, "command_of_this_run": asked.command_of_this_run}
            told |= provenance(device) | (origin or {})
            folder.begin(told, changes=found.patch if found else b"")
            _attempt(folder, open_tracker, compute, shorten)
    except OSError as error:
        raise RunError(disk_sentence(error, folder.path)) from None


def _attempt(
    folder: RunFolder,
    open_tracker: Callable[[], Tracker],
    compute: Callable[[Tracker], Callable[[], object]],
    shorten: str,
) -> None:
    tracker = None
    try:
        tracker = open_tracker()
        tell_the_rest = compute(tracker)
        try:
            tell_the_rest()
            tracker.finish()
        except Exception as error:  # a computed run does not fail as nobody could be told of it
            if not isinstance(error, OSError):
                traceback.print_exception(error)
            warn(f"{folder.path} is complete, but W&B was not told all of it ({short(error)})")
            tracker.finish(failed=True)
        folder.finish()
    except BaseException as error:
        if tracker is not None:
            tracker.finish(failed=True)
        trace = None
        if (whose := exhausted(error)) is not None:
            message = f"{whose} does not hold the run: use a smaller {shorten}"
        elif isinstance(error, OSError):
            message = disk_sentence(error, folder.path)
        elif isinstance(error, RunError):
            message = str(error)
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            message = "interrupted"  # Slurm's jobs exit to be queued again
        else:
            message, trace = short(error), "".join(traceback.format_exception(error))
            print(trace, end="", file=sys.stderr, flush=True)
        try:
            message = folder.fail(message, traceback=trace)
        except OSError:
            warn(f"{folder.path / 'status.json'} could not be written either")
        if not isinstance(error, Exception):
            raise
        raise RunError(message) from error


def check_losses(losses: Iterable[float], step: int) -> None:
    """Raises RunError if a training whose losses these are has diverged."""
    if not all(map(math.isfinite, losses)):
        raise RunError(
            f"the training diverged: its loss is no number at step {step}; use a smaller"
            " training.learning_rate or training.matrix_learning_rate"
        )


def short(error: BaseException) -> str:
    """An error's type and text in one line."""
    return cut(f"{type(error).__name__}: {error}", 500)


def disk_sentence(error: OSError, folder: Path | str, *, key: str | None = "runs_dir") -> str:
    """That a file cannot be written; ``key`` is the setting that says where, if there is one."""
    place = str(error.filename or folder)
    said = f"{cut(repr(place))} cannot be written ({error.strerror or error})"
    return f"{key}: {said}" if key else said
