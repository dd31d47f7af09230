"""Sweeps on any launcher: their cells, their plan on disk, their workers, and what they print.

A callback of Hydra's. In the command it works out all cells before any job starts; in a worker,
which a launcher may have started anywhere, it prepares the process. A cell that breaks off stops no
other: its job says why in the study folder, and the exit code comes from what is found there.
"""

import copy
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict, read_write

from experiments.command import Escape, LauncherError, Remember, RunError, command_line, work_for
from experiments.converge.identity import Located, cell_key
from experiments.converge.settings import ConvergeSettings
from experiments.runs.folder import tidy
from experiments.settings import ConfigError, to_settings
from experiments.sweeps import launchers, plan
from experiments.sweeps.plan import Cell
from experiments.sweeps.report import plain_list
from experiments.sweeps.study import Run, State, look, survey_cells
from experiments.sweeps.watch import Watch


class Sweep(Remember):
    """Lives in the command; a copy of it goes to every worker."""

    current: "Sweep | None" = None  # of the process: a command's, or a worker's copy
    rehearsal = False  # --dry-run

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self.command = ""
        self.directory = ""
        self.parallel = False
        self.threads: int | None = None
        self.batch: int | None = None  # jobs to hand to the launcher together; None: all
        self.watch: Watch | None = None
        self._composed: dict[tuple[str, ...], bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Workers need no cells, and cannot take a thread along."""
        return {**self.__dict__, "cells": [], "watch": None, "_composed": {}}

    # --- in the command -------------------------------------------------------------------------

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        super().on_run_start(config, **kwargs)
        if Sweep.rehearsal:
            with _escaping():
                self._rehearse([_job_config(config)])

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        super().on_multirun_start(config, **kwargs)
        with _escaping():
            self._plan(config)

    def _plan(self, config: DictConfig) -> None:
        composed = _compose(config)
        jobs = [_job_config(job) for _, job in composed]
        if Sweep.rehearsal:
            self._rehearse(jobs)
        launcher = str(config.hydra.runtime.choices["hydra/launcher"])
        launchers.check_installed(launcher)
        self.cells = _cells(jobs)
        self.command = command_line()
        self.directory = os.getcwd()
        self.parallel = launcher != launchers.BASIC
        workers = launchers.workers(
            launcher,
            config.hydra.launcher,
            batch=config.hydra.sweeper.get("max_batch_size"),
        )
        self.batch = workers if launcher == launchers.SUBMITIT_LOCAL else None
        self.threads = launchers.threads(launcher, config.hydra.launcher, workers=workers)
        for study in self.studies():
            plan.record(study, self.command, self.cells_of(study))
        Sweep.current = self
        if not self.parallel:
            self._composed = {words: pickle.dumps(job) for words, job in composed}
            return
        finished = [
            cell for cell, needed in zip(self.cells, self.remaining(), strict=True) if not needed
        ]
        for cell in finished:  # which no worker will look at
            tidy(Path(cell.study) / cell.name)
        done = len(finished)
        print(_opening(launcher, len(self.cells), done, workers, self.threads), flush=True)
        if done == len(self.cells):
            raise Escape()
        self.watch = Watch(self.cells)
        self.watch.start()

    def _rehearse(self, jobs: list[DictConfig]) -> None:
        self.cells = _cells(jobs)
        impossible = False
        for study in self.studies():
            print(f"{study}\n{plain_list(survey_cells(study, self.cells_of(study)))}")
        for error in dict.fromkeys(cell.problem for cell in self.cells if cell.problem):
            print(f"error: {error}", file=sys.stderr)
            impossible = True
        raise SystemExit(2 if impossible else 0)

    def studies(self) -> list[Path]:
        """The folders of the studies that the cells belong to; nearly always one."""
        return [Path(study) for study in dict.fromkeys(cell.study for cell in self.cells)]

    def cells_of(self, study: Path) -> list[Cell]:
        return [cell for cell in self.cells if Path(cell.study) == study]

    def composed(self, overrides: Sequence[str]) -> DictConfig | None:
        """The configuration of a job as the plan has it, once: composing it takes a while."""
        content = self._composed.pop(tuple(overrides), None)
        return None if content is None else pickle.loads(content)

    def runs(self) -> list[Run]:
        """Which cells are finished; of the others, what their files say."""
        return [look(Path(cell.study), cell.name, cell, probe=False) for cell in self.cells]

    def remaining(self) -> list[bool]:
        """Whether each cell has something left to compute."""
        return [run.state is not State.FINISHED for run in self.runs()]

    def close(self) -> int:
        """The launcher is done: an exit code."""
        if self.watch is not None:
            self.watch.stop()
        return 1 if any(self.remaining()) else 0

    # --- in whichever process computes a cell ---------------------------------------------------

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if Sweep.current is self or not self.command:
            return
        Sweep.current = self
        work_for(self.command)
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def attempt(
        self, settings: ConvergeSettings, compute: Callable[[ConvergeSettings], Any]
    ) -> None:
        """Compute one cell; if it breaks off, write down why, so that the others go on."""
        study, key = Path(settings.runs_dir) / settings.study, cell_key(settings)
        try:
            self._enter_directory()
            plan.forget(study, key)
            compute(settings)
        except Exception as error:
            known = isinstance(error, (ConfigError, RunError))
            said = str(error) if known else " ".join(f"{type(error).__name__}: {error}".split())
            try:
                plan.refuse(study, key, said)
                noted = True
            except OSError:
                noted = False
            if not self.parallel or not noted:  # else the command reads it and says it
                print(f"error: {said}", file=sys.stderr, flush=True)

    def _enter_directory(self) -> None:
        """Paths are relative to where the command was typed, also on another machine."""
        try:
            os.chdir(self.directory)
        except OSError:
            raise ConfigError(
                f"the folder {self.directory!r}, from which the sweep was started, is not on"
                f" {os.uname().nodename}: all machines of a sweep must see it"
            ) from None


def run_cell(config: DictConfig, compute: Callable[[ConvergeSettings], Any]) -> bool:
    """Compute a cell of the sweep that this process works for; False if there is none."""
    if Sweep.current is None or HydraConfig.get().mode.name != "MULTIRUN":
        return False
    Sweep.current.attempt(to_settings(config, ConvergeSettings), compute)
    return True


def alone() -> bool:
    """Whether this process is the only one that may draw on the terminal."""
    return Sweep.current is None or not Sweep.current.parallel


def break_off(error: Exception) -> LauncherError:
    """What to say when a launcher fails: a job was killed, a cluster is gone."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (
        f" ({type(error).__name__}: {lines[0][:160]})" if lines else f" ({type(error).__name__})"
    )
    return LauncherError(f"the launcher broke off{first}; the same command carries on")


def _compose(config: DictConfig) -> list[tuple[tuple[str, ...], DictConfig]]:
    """The overrides and the configuration of every job of a sweep, as Hydra will compose it.

    Raises:
        ConfigError: a sweeper that decides on its jobs as it goes.
    """
    sweeper = str(config.hydra.runtime.choices["hydra/sweeper"])
    if sweeper != "basic":
        raise ConfigError(f"hydra/sweeper must be basic, got {sweeper!r}")
    loader = GlobalHydra.instance().config_loader()
    words = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    words += list(config.hydra.overrides.task)
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return [(tuple(job), loader.load_sweep_config(config, job)) for job in jobs]


def _job_config(config: DictConfig) -> DictConfig:
    """What a job gets to see: all but Hydra's own settings."""
    plain = copy.deepcopy(config)
    with read_write(plain), open_dict(plain):
        del plain["hydra"]
    return plain


def _cells(jobs: list[DictConfig]) -> list[Cell]:
    """Raises ConfigError at the first setting that is impossible whatever the model and prompts."""
    known: dict[str, Any] = {}
    cells = []
    for job in jobs:
        settings = to_settings(job, ConvergeSettings)
        run_id = problem = None
        try:
            run_id = Located(settings, known).folder.id
        except ConfigError as error:
            problem = str(error)
        cells.append(
            Cell(
                key=cell_key(settings),
                run_id=run_id,
                problem=problem,
                study=str(Path(settings.runs_dir) / settings.study),
                config=settings.plain(),
            )
        )
    return cells


def _opening(launcher: str, count: int, done: int, workers: int | None, threads: int | None) -> str:
    words = [f"{count} runs"]
    if done:
        words.append(f"{done} finished already" if done < count else "all finished already")
    if done < count:
        words.append(f"launcher {launcher}")
        if workers is not None:
            words.append(f"{workers} at a time")
        if threads is not None:
            words.append(f"{threads} thread{'' if threads == 1 else 's'} each")
    return ", ".join(words)


@contextmanager
def _escaping() -> Iterator[None]:
    """Around what a callback does: its errors get past Hydra."""
    try:
        yield
    except Exception as error:
        raise Escape(error) from error
