"""A sweep on any launcher: planned before any job starts, computed once, its end in an exit code.

Knows of Hydra only what the sweeper in ``hydra_plugins`` hands it.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, open_dict, read_write

from experiments.runs.compute_once import Asked, short
from experiments.runs.folder import RunFolder
from experiments.settings import ConfigError, to_settings
from experiments.sweeps import launchers, plan
from experiments.sweeps.cells import CellJob, Runner, cells_of
from experiments.sweeps.plan import Cell
from experiments.sweeps.progress import Progress
from experiments.sweeps.report import plain_list, report
from experiments.sweeps.study import State, Study, look, survey

Overrides = Sequence[str]
# a function to call, the overrides of the jobs that call it, and the number of the first of them
Launch = Callable[[CellJob, Sequence[Overrides], int], object]


def rehearse(runner: Runner, configs: Sequence[DictConfig]) -> int:
    """Say which runs these are and how they stand, compute nothing; an exit code."""
    cells = cells_of(runner, [to_settings(config, runner.settings) for config in configs])
    for study, of_study in _by_study(cells).items():
        distinct = {cell.name: cell for cell in of_study}
        runs = [look(study, name, cell) for name, cell in distinct.items()]
        print(f"{study}\n{plain_list(Study(study, tuple(runs), ()))}")
    problems = dict.fromkeys(cell.problem for cell in cells if cell.problem)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


def sweep(
    runner: Runner,
    command: str,
    config: DictConfig,
    jobs: Sequence[tuple[Overrides, DictConfig]],
    launch: Launch,
) -> int:
    """Compute what is not finished of a sweep; an exit code.

    Args:
        config: with Hydra's own settings, from which the launcher is made.
        jobs: the overrides of every cell, and what they compose to.

    Raises:
        ConfigError: a setting that cannot be, before anything is written.
    """
    settings = [to_settings(composed, runner.settings) for _, composed in jobs]
    launcher = str(config.hydra.runtime.choices["hydra/launcher"])
    launchers.check_installed(launcher)
    workers = launchers.workers(
        launcher, config.hydra.launcher, batch=config.hydra.sweeper.max_batch_size
    )
    threads = launchers.threads(launcher, config.hydra.launcher, workers=workers)
    cells = cells_of(runner, settings)
    for study, of_study in _by_study(cells).items():
        plan.record(study, command, of_study)

    first = {cell.name: number for number, cell in reversed(list(enumerate(cells)))}
    left = [n for n in sorted(first.values()) if not _is_finished(cells[n])]
    done = len(first) - len(left)
    for number in set(first.values()) - set(left):  # which no job will look at
        RunFolder(Path(cells[number].study) / cells[number].name, cells[number].config).tidy()
    print(_opening(launcher, len(first), done, workers, threads), flush=True)
    job = CellJob(
        runner,
        Asked(command, bar=launcher == launchers.BASIC),
        directory=os.getcwd(),
        threads=threads,
        done=done,
        total=len(first),
    )
    code = 0
    with Progress([cells[n] for n in left], done=done, total=len(first)):
        try:
            if launcher == launchers.BASIC:  # here and now: composing twice would take as long
                for place, number in enumerate(left):
                    job.compute(settings[number], jobs[number][0], place)
            else:
                size = workers if launcher == launchers.SUBMITIT_LOCAL else None
                size = size or config.hydra.sweeper.max_batch_size or len(left) or 1
                with _log_folder(launcher, config.hydra.launcher):
                    for begin in range(0, len(left), size):
                        batch = [jobs[number][0] for number in left[begin : begin + size]]
                        launch(job, batch, begin)
        except KeyboardInterrupt:
            print("error: interrupted; the same command carries on", file=sys.stderr)
            code = 130
        except Exception as error:  # a worker was killed, a cluster is gone
            reason = short(error)[:200]
            print(
                f"error: the launcher broke off ({reason}); the same command carries on",
                file=sys.stderr,
            )
            code = 1
    if not all(_is_finished(cell) for cell in cells):
        code = code or 1
    for study in _by_study(cells):
        print(f"\n{report(survey(study))}")
    return code


@contextmanager
def _log_folder(launcher: str, options: DictConfig) -> Iterator[None]:
    """A folder for the files that submitit's jobs and the sweep exchange, removed if all is well.

    They are pickles: whoever can write them runs code here. So they never lie where studies do.
    """
    if launcher not in launchers.SUBMITIT or options.submitit_folder is not None:
        yield
        return
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = Path(cache) / "stateful_gpt"
    try:
        place.mkdir(parents=True, exist_ok=True)  # all machines of a cluster see a home
        folder = tempfile.mkdtemp(prefix="sweep-", dir=place)  # mode 0700
    except OSError as error:
        raise ConfigError(
            f"hydra.launcher.submitit_folder must be given, as {place} cannot be written"
            f" ({error.strerror or error})"
        ) from None
    with read_write(options), open_dict(options):
        options.submitit_folder = f"{folder}/%j"
    try:
        yield
    except BaseException:
        print(f"the logs of its jobs are in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _by_study(cells: Sequence[Cell]) -> dict[Path, list[Cell]]:
    found: dict[Path, list[Cell]] = {}
    for cell in cells:
        found.setdefault(Path(cell.study), []).append(cell)
    return found


def _is_finished(cell: Cell) -> bool:
    return look(Path(cell.study), cell.name, cell, probe=False).state is State.FINISHED


def _opening(launcher: str, count: int, done: int, workers: int | None, threads: int | None) -> str:
    words = [f"{count} run{'' if count == 1 else 's'}"]
    if done:
        words.append(f"{done} finished already" if done < count else "all finished already")
    if done < count and launcher != launchers.BASIC:
        words.append(f"launcher {launcher}")
        if workers is not None:
            words.append(f"{workers} at a time")
        if threads is not None:
            words.append(f"{threads} thread{'' if threads == 1 else 's'} each")
    return ", ".join(words)
