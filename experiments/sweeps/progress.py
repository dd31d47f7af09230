"""Says in one line what became of each cell of a sweep, as its files appear: a launcher's workers
may be on another machine, with no way to the terminal.
"""

import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from experiments.sweeps import plan
from experiments.sweeps.plan import Cell
from experiments.sweeps.report import names_of
from experiments.sweeps.study import State, look

SECONDS = 0.5  # between two looks


class Progress:
    """While it is entered; what is left to say is said at its end."""

    def __init__(self, cells: Iterable[Cell], *, done: int, total: int) -> None:
        """``cells`` are those to compute, ``done`` of ``total`` were finished before."""
        left = list(cells)
        names = names_of([cell.config for cell in left])
        marks = [plan.changed(cell) for cell in left]
        self._left = list(zip(left, names, marks, strict=True))
        self._done = done
        self._total = total
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS):
            self._look()

    def _look(self) -> None:
        still = []
        for cell, name, before in self._left:
            mark = plan.changed(cell)
            run = look(Path(cell.study), cell.name, cell, probe=False) if mark != before else None
            if run is None or run.state not in (State.FINISHED, State.FAILED):
                still.append((cell, name, before))
                continue
            self._done += 1
            which = f"run {self._done} of {self._total}: {run.shown}  {name}"
            if run.state is State.FAILED:
                tqdm.write(f"{which}: failed", file=sys.stdout)
                tqdm.write(f"error: {run.error} ({name})", file=sys.stderr)
                continue
            overall = run.overall or {}
            passes = overall.get("iterations_to_tolerance")
            settled = "" if passes is None else f", {passes} passes to tolerance"
            tqdm.write(f"{which}: {overall.get('outcome', 'finished')}{settled}", file=sys.stdout)
            sys.stdout.flush()
        self._left = still
