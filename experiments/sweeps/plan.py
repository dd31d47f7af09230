"""What the sweeps of a study set out to compute, and which cells were refused: ``<study>/.sweep/``.

A sweep writes one file, named after its cells, so that the same command replaces its own plan and a
larger grid adds one. A cell that broke off before there was a run folder leaves a note of why.
Knows nothing of Hydra.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.runs.files import read_json, short_hash, write_json, write_text
from experiments.runs.folder import STATUS, now

FOLDER = ".sweep"
_PLANS = "plans"
_REFUSED = "refused"


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep: its settings, and the run they stand for unless that is unknown.

    ``key`` names the settings, ``run_id`` is None where model or prompts cannot be read, and
    ``problem`` then says why.
    """

    key: str
    run_id: str | None
    problem: str | None
    study: str
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """One name for cells of several sweeps that are the same run."""
        return self.run_id or self.key


@dataclass(frozen=True)
class Plan:
    command: str
    written: str
    cells: tuple[Cell, ...]


def record(study: Path, command: str, cells: Iterable[Cell]) -> None:
    """Write down what a sweep is about to compute in a study folder."""
    listed = list(cells)
    name = short_hash([cell.key for cell in listed], 10)
    content = {"command": command, "written": now(), "cells": [asdict(cell) for cell in listed]}
    write_json(study / FOLDER / _PLANS / f"{name}.json", content)


def plans(study: Path) -> list[Plan]:
    """The plans of a study, the newest first; a file that is no plan is left out."""
    found = []
    for path in (study / FOLDER / _PLANS).glob("*.json"):
        content = read_json(path)
        with suppress(KeyError, TypeError):
            cells = tuple(Cell(**cell) for cell in content["cells"])
            found.append(Plan(str(content["command"]), str(content["written"]), cells))
    return sorted(found, key=lambda plan: plan.written, reverse=True)


def refuse(study: Path, key: str, error: str, *, traceback: str | None = None) -> None:
    """Note why a cell broke off; a mistake of ours with its traceback in a file beside it."""
    path = _note(study, key)
    if traceback is not None:
        trace = path.with_suffix(".traceback.txt")
        write_text(trace, traceback)
        error = f"{error} (see {trace})"
    write_json(path, {"error": error, "when": now()})


def forget(study: Path, key: str) -> None:
    """A cell begins anew: what was noted about it is history."""
    path = _note(study, key)
    path.unlink(missing_ok=True)
    path.with_suffix(".traceback.txt").unlink(missing_ok=True)


def refusal(study: Path, key: str) -> str | None:
    """Why the cell's last attempt broke off, if it did."""
    content = read_json(_note(study, key))
    return str(content["error"]) if isinstance(content, dict) and "error" in content else None


def changed(cell: Cell) -> tuple[int, int]:
    """Moves on when a cell's state on disk may have: asked often, hence cheap."""
    study = Path(cell.study)
    return _time_of(study / cell.name / STATUS), _time_of(_note(study, cell.key))


def _note(study: Path, key: str) -> Path:
    return study / FOLDER / _REFUSED / f"{key}.json"


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
