"""The cells of a sweep: which run each one is, and the job that computes it, wherever that is."""

import os
import pkgutil
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.runs.compute_once import Asked, RunError, short
from experiments.runs.files import short_hash
from experiments.settings import ConfigError, Settings, to_settings
from experiments.sweeps import plan
from experiments.sweeps.plan import Cell


@dataclass(frozen=True)
class Runner:
    """A command that computes runs. Its functions are named: importing them imports torch.

    Attributes:
        name: of its package in ``experiments`` and of its primary configuration in ``conf/``.
        settings: the type of its settings.
        compute: ``module:function`` of (settings, how they were asked for); computes one run.
        locate: ``module:function`` of (settings, a dictionary that keeps what many runs have in
            common); the RunFolder they stand for. None: a runner without studies.
    """

    name: str
    settings: type[Settings]
    compute: str
    locate: str | None = None

    def run(self, settings: Any, asked: Asked) -> None:
        pkgutil.resolve_name(self.compute)(settings, asked)

    def command_of_run(self, overrides: Sequence[str]) -> str:
        return shlex.join(["python", "-m", f"experiments.{self.name}", *overrides])


def cell_key(settings: Any) -> str:
    """Names a cell of a sweep by its settings alone, also where no run can be located."""
    return short_hash(settings.plain(), 16)


def cells_of(runner: Runner, all_settings: Sequence[Any]) -> list[Cell]:
    """The cells with these settings, in their order."""
    assert runner.locate is not None
    locate = pkgutil.resolve_name(runner.locate)
    known: dict[Any, Any] = {}
    cells = []
    for settings in all_settings:
        run_id = problem = None
        try:
            run_id = locate(settings, known).id
        except ConfigError as error:  # what the run depends on cannot be read
            problem = str(error)
        study = str(Path(settings.runs_dir) / settings.study)
        cells.append(Cell(cell_key(settings), run_id, problem, study, settings.plain()))
    return cells


def overrides_of_the_job() -> list[str]:
    """What the job that Hydra runs now was told, as it was typed."""
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return [str(word) for word in words]


@dataclass(frozen=True)
class CellJob:
    """What a launcher is given to call: computes a cell in whichever process it finds itself.

    A cell that breaks off stops no other: it writes down why, where the sweep will look for it.

    Attributes:
        directory: from which the sweep was started; its paths are relative to that.
        threads: of PyTorch; None leaves them alone.
        done, total: how many of the sweep's runs were finished when it began, and how many it has.
    """

    runner: Runner
    asked: Asked
    directory: str
    threads: int | None
    done: int
    total: int

    def __call__(self, config: DictConfig) -> None:
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        self.compute(
            to_settings(config, self.runner.settings),
            overrides_of_the_job(),
            HydraConfig.get().job.num,
        )

    def compute(self, settings: Any, overrides: Sequence[str], number: int) -> None:
        """The cell with these settings; ``number`` counts what the sweep has to compute."""
        study, key = Path(settings.runs_dir) / settings.study, cell_key(settings)
        asked = replace(
            self.asked,
            command_of_this_run=self.runner.command_of_run(overrides),
            place=f"run {self.done + number + 1} of {self.total}",
        )
        try:
            self._enter_directory()
            plan.forget(study, key)
            self.runner.run(settings, asked)
        except Exception as error:
            message, trace = str(error), None
            if not isinstance(error, (ConfigError, RunError)):
                trace = "".join(traceback.format_exception(error))
                print(trace, end="", file=sys.stderr, flush=True)
                message = short(error)
            try:
                plan.refuse(study, key, message, traceback=trace)
            except OSError:
                print(f"error: {message}", file=sys.stderr, flush=True)

    def _enter_directory(self) -> None:
        try:
            os.chdir(self.directory)
        except OSError:
            raise ConfigError(
                f"the folder {self.directory!r}, from which the sweep was started, is not on"
                f" {os.uname().nodename}: all machines of a sweep must see it"
            ) from None
