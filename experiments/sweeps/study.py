"""How a study stands: the state of every run that was begun or planned, and how to complete it.

Reads files only, and never more of a run than its status, settings and summary.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from experiments.runs.files import read_json
from experiments.runs.folder import CONFIG, STATUS, SUMMARY
from experiments.runs.lock import LOCK, is_held
from experiments.sweeps import plan
from experiments.sweeps.plan import Cell, Plan

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class State(StrEnum):
    """What became of a run; the order is that of the report."""

    FINISHED = "finished"
    RUNNING = "running"
    INTERRUPTED = "interrupted"  # begun, and nobody is computing it any more
    FAILED = "failed"
    MISSING = "missing"  # planned by a sweep and never begun


@dataclass(frozen=True)
class Run:
    """A run of a study, or a cell of a sweep that never became one (``run_id`` is None then)."""

    run_id: str | None
    state: State
    error: str | None
    when: str | None
    config: dict[str, Any] | None
    overall: dict[str, Any] | None
    command: str | None


@dataclass(frozen=True)
class Study:
    path: Path
    runs: tuple[Run, ...]
    plans: tuple[Plan, ...]

    @property
    def complete(self) -> bool:
        return all(run.state is State.FINISHED for run in self.runs)

    def counts(self) -> str:
        """``24 runs: 22 finished, 2 failed``"""
        found = Counter(run.state for run in self.runs)
        parts = ", ".join(f"{found[state]} {state}" for state in State if found[state])
        return f"{len(self.runs)} run{'' if len(self.runs) == 1 else 's'}: {parts or 'none'}"

    def commands(self) -> list[str]:
        """The fewest commands found that compute all that is not finished."""
        missing = {run.run_id: run.command for run in self.runs if run.state is not State.FINISHED}
        open_cells = [
            (p.command, {cell.run_id for cell in p.cells if cell.run_id in missing} - {None})
            for p in self.plans
        ]
        open_cells += [
            (p.command, {None}) for p in self.plans if any(cell.run_id is None for cell in p.cells)
        ]
        needed: list[str] = []
        left: set[str | None] = set(missing)
        while left:
            command, covered = max(
                open_cells, key=lambda entry: len(entry[1] & left), default=("", set())
            )
            if not covered & left:
                break
            needed.append(command)
            left -= covered
        needed += [own for run_id in left if (own := missing[run_id])]
        return list(dict.fromkeys(needed))


def survey(path: Path) -> Study:
    """The runs of a study folder, with those that are only planned."""
    plans = plan.plans(path)
    cells = {cell.name: cell for p in reversed(plans) for cell in p.cells}
    begun = {folder.name for folder in path.glob("[!.]*") if folder.is_dir() and _is_run(folder)}
    runs = [look(path, name, cells.get(name)) for name in sorted(begun | set(cells))]
    return Study(path, tuple(runs), tuple(plans))


def survey_cells(path: Path, cells: Iterable[Cell]) -> Study:
    """The same of some cells only, in their order."""
    distinct = {cell.name: cell for cell in cells}
    return Study(path, tuple(look(path, name, cell) for name, cell in distinct.items()), ())


def look(path: Path, name: str, cell: Cell | None, *, probe: bool = True) -> Run:
    """The state of one run: of a folder, of a planned cell, or of both.

    ``probe`` asks whether somebody holds the folder, which takes hold of it for a moment; without
    it, a run that was killed seems to be running.
    """
    folder = path / name
    status = read_json(folder / STATUS)
    status = status if isinstance(status, dict) else {}
    nameless = cell is not None and cell.run_id is None
    state, error, when = _state(folder, status, probe=probe)
    overall: dict[str, Any] | None = None
    if state is State.FINISHED:
        summary = read_json(folder / SUMMARY)
        # state tracking has no prompts, hence nothing over all of them
        overall = summary.get("overall", summary) if isinstance(summary, dict) else None
    elif cell is not None and state is not State.RUNNING:
        note = plan.refusal(path, cell.key)
        if note is not None:
            state, error, when = State.FAILED, str(note["error"]), note.get("when")
    return Run(
        run_id=None if nameless else name,
        state=state,
        error=error,
        when=when,
        config=cell.config if cell is not None else _config(folder),
        overall=overall,
        command=status.get("command"),
    )


def _state(
    folder: Path, status: dict[str, Any], *, probe: bool
) -> tuple[State, str | None, str | None]:
    said, when = status.get("state"), status.get("finished")
    if said == "finished":
        return State.FINISHED, None, when
    held = is_held(folder) if probe else None
    if held or (held is None and said == "running"):
        return State.RUNNING, None, None
    if said == "failed":
        error = status.get("error")
        if error == "interrupted":
            return State.INTERRUPTED, None, when
        return State.FAILED, str(error), when
    # a folder without a status was killed before its first file
    return (State.INTERRUPTED if folder.is_dir() else State.MISSING), None, None


def _is_run(folder: Path) -> bool:
    """A folder of ours, also one that was killed before its first file."""
    return any((folder / name).exists() for name in (STATUS, CONFIG, LOCK))


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        content = yaml.load((folder / CONFIG).read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
