"""What the sweeps of a study set out to compute: ``<study>/.sweep/plans/``.

A sweep writes one file, named after its cells, so that the same command replaces its own plan and a
larger grid adds one. Knows nothing of Hydra.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.runs.files import read_json, short_hash, write_json
from experiments.runs.folder import now

PLANS = Path(".sweep", "plans")


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


def record(study: Path, command: str, cells: Sequence[Cell]) -> None:
    """Write down what a sweep is about to compute in a study folder."""
    name = short_hash([cell.key for cell in cells])
    plan = Plan(command, now(), tuple(cells))
    write_json(study / PLANS / f"{name}.json", asdict(plan))


def plans(study: Path) -> list[Plan]:
    """The plans of a study, the newest first; a file that is no plan is left out."""
    found = []
    for path in (study / PLANS).glob("*.json"):
        with suppress(KeyError, TypeError):
            plan = read_json(path)
            cells = tuple(Cell(**cell) for cell in plan["cells"])
            found.append(Plan(str(plan["command"]), str(plan["written"]), cells))
    return sorted(found, key=lambda plan: plan.written, reverse=True)
