"""A sweep on any launcher: planned before any job starts, computed once, its end in an exit code.

Knows of Hydra only what a job is told, and what the sweeper in ``hydra_plugins`` hands it.
"""

import multiprocessing
import os
import pkgutil
import shlex
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from tqdm import tqdm

from experiments.runs.compute_once import Asked, RunError, short
from experiments.runs.files import short_hash
from experiments.runs.folder import STATUS, RunFolder
from experiments.settings import ConfigError, Settings, to_settings
from experiments.sweeps import launchers, processes
from experiments.sweeps.report import LONGEST, names_of, outcome_of, report, table
from experiments.sweeps.study import Cell, State, Study, look, record, survey
from stateful_gpt.console import cut

Overrides = Sequence[str]
# a function to call, the overrides of the jobs that call it, and the number of the first of them
Launch = Callable[["CellJob", Sequence[Overrides], int], object]
SECONDS = 0.5  # between two looks at what has become of the cells


@dataclass(frozen=True)
class Runner:
    """A command that computes runs. Its functions are named: importing them imports torch."""

    name: str  # of its package in ``experiments`` and of its primary configuration in ``conf/``
    settings: type[Settings]
    compute: str  # ``module:function`` of (settings, Asked); computes one run
    # ``module:function`` of (settings, what many runs have in common), which finds their RunFolder;
    # None: a runner without studies
    locate: str | None = None

    def run(self, settings: Any, asked: Asked) -> None:
        pkgutil.resolve_name(self.compute)(settings, asked)

    def folder(self, settings: Any, known: dict[Any, Any]) -> RunFolder:
        assert self.locate is not None
        found: RunFolder = pkgutil.resolve_name(self.locate)(settings, known)
        return found

    def command_of_run(self, overrides: Sequence[str]) -> str:
        return shlex.join(["python", "-m", f"experiments.{self.name}", *overrides])


def overrides_of_the_job() -> list[str]:
    """What the job that Hydra runs now was told, as it was typed."""
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return [str(word) for word in words]


@dataclass(frozen=True)
class CellJob:
    """What a launcher is given to call: computes a cell in whichever process it finds itself.

    A cell that breaks off stops no other: its run folder says why.
    """

    runner: Runner
    asked: Asked
    directory: str  # from which the sweep was started; its paths are relative to that
    threads: int | None  # of PyTorch; None leaves them alone
    done: int  # of the sweep's runs, when it began
    total: int
    gpus: Sequence[str]  # that the workers divide
    gpu_folder: str  # of their locks

    def __call__(self, config: DictConfig) -> None:
        if self.gpus:
            launchers.take_gpu(self.gpus, self.gpu_folder)
        if (parent := multiprocessing.parent_process()) and parent.pid:  # of joblib's workers
            processes.end_with(parent.pid)
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":  # on Slurm it means other things
            processes.end_when_told()
        job = HydraConfig.get().job.num
        self.compute(to_settings(config, self.runner.settings), overrides_of_the_job(), job)

    def compute(self, settings: Any, overrides: Overrides, number: int) -> None:
        """The cell with these settings; ``number`` counts what the sweep has to compute."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        asked = replace(
            self.asked,
            command_of_this_run=self.runner.command_of_run(overrides),
            place=f"run {self.done + number + 1} of {self.total}",
        )
        try:
            if not Path(self.directory).is_dir():
                raise ConfigError(
                    f"the folder {self.directory!r}, from which the sweep was started, is not on"
                    f" {os.uname().nodename}: all machines of a sweep must see it"
                )
            os.chdir(self.directory)
            self.runner.run(settings, asked)
        except Exception as error:
            message, trace = str(error), None
            if not isinstance(error, (ConfigError, RunError)):
                trace = "".join(traceback.format_exception(error))
                print(trace, end="", file=sys.stderr, flush=True)
                message = short(error)
            try:
                self.runner.folder(settings, {}).refuse(message, traceback=trace)
            except (ConfigError, OSError):
                print(f"error: {message}", file=sys.stderr, flush=True)


def cells_of(runner: Runner, all_settings: Sequence[Any]) -> list[Cell]:
    """The cells with these settings, in their order."""
    known: dict[Any, Any] = {}
    cells = []
    for settings in all_settings:
        run_id = problem = None
        try:
            run_id = runner.folder(settings, known).id
        except ConfigError as error:  # what the run depends on cannot be read
            problem = str(error)
        study, config = str(Path(settings.runs_dir, settings.study)), settings.plain()
        cells.append(Cell(short_hash(config, 16), run_id, problem, study, config))
    return cells


def rehearse(runner: Runner, configs: Sequence[DictConfig]) -> int:
    """Say which runs these are and how they stand, compute nothing; an exit code."""
    cells = cells_of(runner, [to_settings(config, runner.settings) for config in configs])
    for study, of_study in _by_study(cells):
        distinct = {cell.path: cell for cell in of_study}
        runs = tuple(look(path, cell) for path, cell in distinct.items())
        print(f"{study}\n{table(Study(study, runs, ()))}")
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
    settings: list[Any] = [to_settings(composed, runner.settings) for _, composed in jobs]
    launcher = str(config.hydra.runtime.choices["hydra/launcher"])
    options, sweeper = config.hydra.launcher, config.hydra.sweeper
    launchers.check_installed(launcher)
    devices = {one.device.name for one in settings}
    workers = launchers.workers(launcher, options, sweeper, runs=len(settings), devices=devices)
    threads = launchers.threads(launcher, options, workers=workers)
    cells = cells_of(runner, settings)
    problems = {cell.problem for cell in cells}
    if len(problems) == 1 and (problem := problems.pop()) is not None:
        raise ConfigError(problem)  # such as a wrong prompt file: once, not for every cell

    distinct: dict[Path, tuple[Cell, Any, Overrides]] = {}
    for cell, one, (overrides, _) in zip(cells, settings, jobs, strict=True):
        distinct.setdefault(cell.path, (cell, one, overrides))
    whole = set()  # finished runs: their files have been looked at
    for path, (cell, *_) in distinct.items():
        if look(path, cell, probe=False).state is State.FINISHED:
            RunFolder(path, cell.config).tidy()  # no job will look at it
            whole.add(path)
    waiting = [job for path, job in distinct.items() if path not in whole]
    for study, of_study in _by_study(cells):
        done = whole.issuperset(cell.path for cell in of_study)
        with suppress(OSError) if done else nullcontext():  # perhaps nothing can be written
            record(study, command, of_study)
    left = [job for job in waiting if job[0].problem is None]
    total, ended = len(distinct), len(distinct) - len(left)
    words = [f"{total} run{'' if total == 1 else 's'}"]
    if whole:
        words.append(f"{len(whole)} finished already")
    here = launcher == launchers.BASIC and workers == 1
    if left and not here:
        many = {"runs at a time": workers, "threads of each": threads}
        words += [f"launcher {launcher}", *(f"{what}: {n}" for what, n in many.items() if n)]
    print(", ".join(words), flush=True)
    asked = Asked(command, bar=here)
    gpus = launchers.gpus(launcher, options, devices=devices)
    code = 0
    with tempfile.TemporaryDirectory(prefix="gpus-") if gpus else nullcontext("") as folder:
        job = CellJob(runner, asked, os.getcwd(), threads, ended, total, gpus, folder)
        # composing once more, as Hydra's launchers do, would take as long as a short run
        runs = [partial(job.compute, one, words, at) for at, (_, one, words) in enumerate(left)]
        try:
            with ExitStack() as stack:
                wait = None
                if launcher == launchers.BASIC and not here:
                    wait = stack.enter_context(processes.forked(runs, min(workers or 1, len(runs))))
                stack.enter_context(_progress([cell for cell, *_ in waiting], whole, total))
                if here:
                    for run in runs:
                        run()
                elif wait is not None:
                    wait()
                else:
                    size = workers if launcher == launchers.SUBMITIT_LOCAL else None
                    size = size or sweeper.max_batch_size or len(left) or 1
                    stack.enter_context(_log_folder(launcher, options))
                    for begin in range(0, len(left), size):
                        launch(job, [words for *_, words in left[begin : begin + size]], begin)
        except KeyboardInterrupt:
            print("error: interrupted; the same command carries on", file=sys.stderr)
            code = 130
            if launcher == launchers.SUBMITIT_LOCAL:
                processes.end_jobs(str(options.submitit_folder))
            elif launcher in launchers.SUBMITIT:
                print("its jobs stay with Slurm; scancel ends them", file=sys.stderr)
        except ConfigError:
            raise
        except Exception as error:  # a worker was killed, a cluster is gone
            reason = f"the launcher broke off ({short(error)[:200]})"
            print(f"error: {reason}; the same command carries on", file=sys.stderr)
            code = 1
    for study, of_study in _by_study(cells):
        found = survey(study, whole=whole)
        print(f"\n{report(found)}")
        finished = {study / run.name for run in found.runs if run.state is State.FINISHED}
        if not finished.issuperset(cell.path for cell in of_study):
            code = code or 1
    return code


@contextmanager
def _progress(cells: Sequence[Cell], whole: set[Path], total: int) -> Iterator[None]:
    """Say in one line what became of each cell, as its files appear: a launcher's workers may be on
    another machine, with no way to the terminal. What is finished joins the ``whole``.
    """

    def written(cell: Cell) -> int:
        status = cell.path / STATUS
        return status.stat().st_mtime_ns if status.exists() else 0

    names = names_of([cell.config for cell in cells])
    left = [(cell, name, written(cell)) for cell, name in zip(cells, names, strict=True)]
    ended = threading.Event()

    def say() -> None:
        for one in list(left):
            cell, name, before = one
            if cell.problem is None and written(cell) == before:
                continue
            run = look(cell.path, cell, probe=False, whole=True)
            if run.state is State.FINISHED:
                whole.add(cell.path)
            elif run.state is not State.FAILED:
                continue
            left.remove(one)
            what = outcome_of(run) if run.error is None else str(run.state)
            passes = (run.overall or {}).get("iterations_to_tolerance")
            noun = "pass" if passes == 1 else "passes"
            settled = "" if passes is None else f", {cut(passes)} {noun} to tolerance"
            place = f"run {total - len(left)} of {total}"
            tqdm.write(f"{place}: {run.shown}  {name}: {what}{settled}", sys.stdout)
            if run.error is not None:
                tqdm.write(f"error: {cut(run.error, LONGEST)} ({name})", sys.stderr)
            sys.stdout.flush()

    def watch() -> None:
        while not ended.wait(SECONDS):
            say()

    thread = threading.Thread(target=watch, daemon=True)
    try:
        thread.start()
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
        say()


@contextmanager
def _log_folder(launcher: str, options: DictConfig) -> Iterator[None]:
    """A folder for the files that submitit's jobs and the sweep exchange, removed if all is well.

    They are pickles: whoever can write them runs code here. So they never lie where studies do.
    """
    if launcher not in launchers.SUBMITIT or options.submitit_folder is not None:
        yield
        return
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "stateful_gpt")
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
    logs = [log.read_text("utf-8", "replace") for log in sorted(Path(folder).rglob("*.err"))]
    for line in dict.fromkeys("".join(logs).splitlines()):
        if line.startswith(("warning: ", "error: ")):
            print(line, file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)


def _by_study(cells: Sequence[Cell]) -> list[tuple[Path, list[Cell]]]:
    ordered = sorted(cells, key=lambda cell: cell.study)
    return [(Path(study), list(group)) for study, group in groupby(ordered, lambda c: c.study)]
