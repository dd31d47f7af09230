"""How a study stands: the state of every run that was begun or planned, and how to complete it.

Reads files only, and never more of a run than its status, settings and summary. What sweeps set
out to compute is in ``<study>/.sweep/plans/``: a file for each, named after its cells, so that the
same command replaces its own plan and a larger grid adds one.
"""

import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from experiments.runs.files import read_json, short_hash, write_json
from experiments.runs.folder import CONFIG, STATUS, SUMMARY, damage, now, read_config, read_status
from experiments.runs.lock import LOCK, is_held
from stateful_gpt.console import cut

PLANS = Path(".sweep", "plans")
RUNNERS = ("experiments.converge", "experiments.state_tracking")
LONGEST_COMMAND = 100_000  # characters
# of Hydra's own settings, those that name nothing to call
SETTING = re.compile(
    r"-m|--multirun|[+~]{0,2}(?!hydra\b)[\w./@]+(=.*)?|hydra/launcher=\w+|hydra\.mode=\w+"
    r"|hydra\.launcher\.ray\.init\.address=auto"  # no other: it is sent what to run
    r"|hydra\.(launcher|sweeper)\.(n_jobs|max_batch_size|processes|timeout_min|cpus_per_task"
    r"|gpus_per_node|tasks_per_node|nodes|mem_gb|partition|account|qos|array_parallelism"
    r"|constraint|max_num_timeout|signal_delay_s|ray\.remote\.(num_cpus|num_gpus|max_retries))"
    r"=[\w.,:-]*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep: its settings, and the run they stand for."""

    key: str  # names the settings
    run_id: str | None  # None where model or prompts cannot be read
    problem: str | None  # why they cannot
    study: str
    config: dict[str, Any]

    @property
    def path(self) -> Path:
        """The same of cells of several sweeps that are the same run."""
        return Path(self.study, self.run_id or self.key)


@dataclass(frozen=True)
class Plan:
    command: str
    written: str
    cells: tuple[Cell, ...]


class State(StrEnum):
    """What became of a run."""

    FINISHED = "finished"
    DAMAGED = "damaged"  # finished once, and computed again by the same command
    RUNNING = "running"
    INTERRUPTED = "interrupted"  # begun, and nobody is computing it any more
    FAILED = "failed"
    MISSING = "missing"  # planned by a sweep and never begun


@dataclass(frozen=True)
class Run:
    """A run of a study, or a cell of a sweep that never became one."""

    name: str  # its id, or the key of its cell, which nobody needs to be shown
    state: State
    error: str | None
    config: dict[str, Any] | None
    overall: dict[str, Any] | None  # what the summary of a finished run says of all of it
    command: str | None
    located: bool = True  # whether model and prompts can be read

    @property
    def shown(self) -> str:
        return cut(self.name) if self.located else "–"


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
        """Few commands that compute all that is not finished: largest sweeps first."""
        left = {run.name: run for run in self.runs if run.state is not State.FINISHED}
        offers = [({cell.path.name for cell in plan.cells}, plan) for plan in self.plans]
        needed = []
        for names, plan in sorted(offers, key=lambda offer: -len(offer[0] & set(left))):
            if names & set(left) and (said := self._here(plan.command, plan.cells[0].config)):
                needed.append(said)
                left = {name: run for name, run in left.items() if name not in names}
        own = [self._here(run.command, run.config) for run in left.values()]
        return list(dict.fromkeys([*needed, *filter(None, own)]))

    def _here(self, command: object, config: dict[str, Any] | None) -> str | None:
        """``ours``, and where the study has been moved or copied to since, if it may have been."""
        said, here, was = ours(command), os.path.abspath(self.path), config or {}
        if said is None or here == os.path.abspath(f"{was.get('runs_dir')}/{was.get('study')}"):
            return said
        runs_dir, study = os.path.split(here)  # quoted: 2024_11_30 is a number
        return shlex.join([*shlex.split(said), f'runs_dir="{runs_dir}"', f'study="{study}"'])


def ours(command: object) -> str | None:
    """A stored command composed anew, if it is one of this project's with plain settings: a study
    may come from anywhere, and what is printed may be typed.
    """
    if not isinstance(command, str) or len(command) > LONGEST_COMMAND:
        return None
    try:
        python, dash_m, module, *words = shlex.split(command)
    except ValueError:  # too few, or a quotation that does not end
        return None
    named = (python, dash_m) == ("python", "-m") and module in RUNNERS
    plain = named and all(SETTING.fullmatch(word) for word in words)
    return shlex.join([python, dash_m, module, *words]) if plain else None


def record(study: Path, command: str, cells: Sequence[Cell]) -> None:
    """Write down what a sweep is about to compute in a study folder."""
    name = short_hash([cell.key for cell in cells])
    (study / PLANS).mkdir(parents=True, exist_ok=True)
    write_json(study / PLANS / f"{name}.json", asdict(Plan(command, now(), tuple(cells))))


def plans(study: Path) -> list[Plan]:
    """The plans of a study, the newest first; a file that is no plan is left out."""
    found = []
    for path in (study / PLANS).glob("*.json"):
        with suppress(ValidationError):
            found.append(TypeAdapter(Plan).validate_python(read_json(path)))
    return sorted(found, key=lambda plan: plan.written, reverse=True)


def survey(path: Path, *, whole: Collection[Path] = ()) -> Study:
    """The runs of a study folder, with those that are only planned; the files of the ``whole`` need
    not be looked at again.
    """
    planned = plans(path)
    newest = {cell.key: cell for plan in reversed(planned) for cell in plan.cells}
    cells = {cell.path.name: cell for cell in newest.values()}
    begun = {
        folder.name
        for folder in path.glob("[!.]*")
        # also of a run that was killed before its first file
        if folder.is_dir()
        and any((folder / name).exists() for name in (STATUS, CONFIG, LOCK))
        # one that was refused counts as long as a sweep plans it
        and read_status(folder).get("started", "") is not None
    }
    runs = [
        look(path / name, cells.get(name), whole=path / name in whole)
        for name in sorted(begun | set(cells))
    ]
    return Study(path, tuple(runs), tuple(planned))


def look(folder: Path, cell: Cell | None, *, probe: bool = True, whole: bool = False) -> Run:
    """The state of one run: of a folder, of a planned cell, or of both.

    ``probe`` asks whether somebody holds the folder, which takes hold of it for a moment; without
    it, a run that was killed seems to be running. ``whole``: its files are, if it is finished.
    """
    status, error = read_status(folder), None
    said = status.get("state")
    held = is_held(folder) if probe and said != "finished" else None
    if cell is not None and cell.problem is not None:
        state, error = State.FAILED, cell.problem
    elif said == "finished":
        error = None if whole else damage(folder)
        state = State.FINISHED if error is None else State.DAMAGED
    elif held or (held is None and said == "running"):
        state = State.RUNNING
    elif said == "failed" and status.get("error") != "interrupted":
        state, error = State.FAILED, str(status.get("error"))
    else:  # a folder without a status was killed before its first file
        state = State.INTERRUPTED if folder.is_dir() else State.MISSING
    overall = read_json(folder / SUMMARY) if state is State.FINISHED else None
    if isinstance(overall, dict):  # state tracking has no prompts, hence nothing over all of them
        overall = overall.get("overall", overall)
    return Run(
        name=folder.name,
        state=state,
        error=error,
        config=cell.config if cell is not None else read_config(folder),
        overall=overall if isinstance(overall, dict) else None,
        command=status.get("command"),
        located=cell is None or cell.problem is None,
    )
