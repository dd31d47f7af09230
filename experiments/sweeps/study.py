"""How a study stands: the state of every run that was begun or planned, and how to complete it.

Reads files only, and never more of a run than its status, settings and summary.
"""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from experiments.runs.files import read_json
from experiments.runs.folder import CONFIG, STATUS, SUMMARY, read_status
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
    """A run of a study, or a cell of a sweep that never became one.

    ``name`` is its id; where model or prompts cannot be read, it is the key of its cell, which
    nobody needs to be shown.
    """

    name: str
    state: State
    error: str | None
    config: dict[str, Any] | None
    overall: dict[str, Any] | None
    command: str | None
    located: bool = True

    @property
    def shown(self) -> str:
        return self.name if self.located else "–"


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
        missing = {run.name: run.command for run in self.runs if run.state is not State.FINISHED}
        offers = [(p.command, {cell.name for cell in p.cells}) for p in self.plans]
        needed: list[str] = []
        left = set(missing)
        while offers:
            command, covered = max(offers, key=lambda offer: len(offer[1] & left))
            if not covered & left:
                break
            needed.append(command)
            left -= covered
        needed += [own for name, own in missing.items() if own and name in left]
        return list(dict.fromkeys(needed))


def survey(path: Path) -> Study:
    """The runs of a study folder, with those that are only planned."""
    plans = plan.plans(path)
    cells = {cell.name: cell for p in reversed(plans) for cell in p.cells}
    begun = {
        folder.name
        for folder in path.glob("[!.]*")
        # also of a run that was killed before its first file
        if folder.is_dir() and any((folder / name).exists() for name in (STATUS, CONFIG, LOCK))
    }
    runs = [look(path, name, cells.get(name)) for name in sorted(begun | set(cells))]
    return Study(path, tuple(runs), tuple(plans))


def look(path: Path, name: str, cell: Cell | None, *, probe: bool = True) -> Run:
    """The state of one run: of a folder, of a planned cell, or of both.

    ``probe`` asks whether somebody holds the folder, which takes hold of it for a moment; without
    it, a run that was killed seems to be running.
    """
    folder = path / name
    status = read_status(folder)
    state, error = _state(folder, status, probe=probe)
    overall: dict[str, Any] | None = None
    if state is State.FINISHED:
        summary = read_json(folder / SUMMARY)
        # state tracking has no prompts, hence nothing over all of them
        overall = summary.get("overall", summary) if isinstance(summary, dict) else None
    elif cell is not None and state is not State.RUNNING:
        refused = plan.refusal(path, cell.key)
        state, error = (State.FAILED, refused) if refused is not None else (state, error)
    return Run(
        name=name,
        state=state,
        error=error,
        config=cell.config if cell is not None else _config(folder),
        overall=overall,
        command=status.get("command"),
        located=cell is None or cell.run_id is not None,
    )


def _state(folder: Path, status: dict[str, Any], *, probe: bool) -> tuple[State, str | None]:
    said = status.get("state")
    if said == "finished":
        return State.FINISHED, None
    held = is_held(folder) if probe else None
    if held or (held is None and said == "running"):
        return State.RUNNING, None
    if said == "failed" and status.get("error") != "interrupted":
        return State.FAILED, str(status.get("error"))
    # a folder without a status was killed before its first file
    return (State.INTERRUPTED if folder.is_dir() else State.MISSING), None


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        content = yaml.load((folder / CONFIG).read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
