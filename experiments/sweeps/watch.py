"""Says in one line what became of each cell of a parallel sweep, as its files appear: a launcher's
workers may be on another machine, with no way to the terminal.
"""

import sys
import threading
from pathlib import Path

from experiments.sweeps.plan import Cell
from experiments.sweeps.report import names_of
from experiments.sweeps.study import Run, State, look

WATCH_SECONDS = 0.5


class Watch(threading.Thread):
    """From ``start`` to ``stop``, which says what is left to say."""

    def __init__(self, cells: list[Cell]) -> None:
        super().__init__(daemon=True)
        self._cells = list({cell.name: cell for cell in cells}.values())
        names = names_of([cell.config for cell in self._cells])
        self._left = {
            cell.name: (cell, name, self._mark(cell))
            for cell, name in zip(self._cells, names, strict=True)
        }
        self._said = 0
        for name in [n for n, (_, _, mark) in self._left.items() if mark[0] is State.FINISHED]:
            del self._left[name]
            self._said += 1
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            self._look()

    def stop(self) -> None:
        self._ended.set()
        self.join()
        self._look()

    def _look(self) -> None:
        for key, (cell, name, before) in list(self._left.items()):
            run = look(Path(cell.study), cell.name, cell, probe=False)
            if run.state not in (State.FINISHED, State.FAILED) or (run.state, run.when) == before:
                continue
            del self._left[key]
            self._said += 1
            total = len(self._cells)
            where = f"[{self._said:{len(str(total))}}/{total}]"
            if run.state is State.FINISHED:
                print(f"{where} {run.run_id}  {name}: {_outcome(run)}", flush=True)
            else:
                print(f"{where} {run.run_id or '–'}  {name}: failed", flush=True)
                print(f"error: {run.error} ({name})", file=sys.stderr, flush=True)

    @staticmethod
    def _mark(cell: Cell) -> tuple[State, str | None]:
        run = look(Path(cell.study), cell.name, cell, probe=False)
        return run.state, run.when


def _outcome(run: Run) -> str:
    overall = run.overall or {}
    passes = overall.get("iterations_to_tolerance")
    settled = "" if passes is None else f", {passes} passes to tolerance"
    return f"{overall.get('outcome', 'finished')}{settled}"
