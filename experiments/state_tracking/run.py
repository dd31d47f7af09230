"""Which models can follow a state? One contestant on one task, or a sweep of them.

    python -m experiments.state_tracking contestant.layers=3
    python -m experiments.state_tracking -m experiment=state_tracking

One run is one folder, ``<runs_dir>/<study>/<run_id>/``: ``config.yaml``, ``status.json``,
``accuracy.parquet`` (by depth and level), ``history.parquet`` and ``summary.json``. A finished run
is not run again; one that was killed starts afresh, which takes seconds and gives the same numbers.
"""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import hydra
import pyarrow as pa
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.command import CONF, RunError, run_command, saying_why
from experiments.runs.failure import disk_sentence, no_locks, record_failure, warn
from experiments.runs.files import write_json, write_table
from experiments.runs.folder import SUMMARY, RunFolder, tidy
from experiments.runs.provenance import changes, provenance
from experiments.settings import ConfigError, to_settings
from experiments.state_tracking.contest import Result, compete
from experiments.state_tracking.settings import (
    ContestantSettings,
    StateTrackingSettings,
)
from experiments.state_tracking.tasks import Target, make_task
from experiments.tracking.tracker import Tracker
from stateful_gpt.device import choose_device

ACCURACY = "accuracy.parquet"
HISTORY = "history.parquet"
GOOD = 0.9  # accuracy at which a level counts as solved


def run_id(settings: StateTrackingSettings) -> str:
    """A short hash of everything that can change a result."""
    return hashlib.sha256(json.dumps(settings.deciding(), sort_keys=True).encode()).hexdigest()[:10]


def name_of(contestant: ContestantSettings) -> str:
    """What a contestant is called in tables and figures."""
    layers = f"{contestant.layers} layer{'s' if contestant.layers > 1 else ''}"
    longer = f", {contestant.times} x steps" if contestant.times > 1 else ""
    if contestant.passes == 1:
        return f"plain, {layers}{longer}"
    how = "through" if contestant.through else "detached"
    drawn = " drawn" if contestant.drawn else ""
    return f"stateful, {layers}, {contestant.passes} passes{drawn} {how}{longer}"


def track(settings: StateTrackingSettings) -> Path:
    """Run the contest of these settings unless that is done; returns the run folder.

    Raises:
        ConfigError: settings that cannot be.
        RunError: the run broke off.
    """
    try:
        device = choose_device(settings.device.name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    folder = RunFolder(settings, run_id(settings))
    if folder.finished:
        tidy(folder.path)
        print(f"{folder.path} is finished: nothing to compute")
        return folder.path
    try:
        with folder.locked(
            lambda: print(f"{folder.path} is being computed elsewhere: waiting", flush=True),
            lambda: warn(no_locks(folder.path)),
        ):
            if folder.finished:
                print(f"{folder.path} was finished meanwhile: nothing to compute")
                return folder.path
            _compute(settings, folder, device)
    except OSError as error:
        raise RunError(disk_sentence(error, folder.path)) from None
    return folder.path


def _compute(settings: StateTrackingSettings, folder: RunFolder, device: torch.device) -> None:
    changed = changes()
    folder.begin(settings, provenance(device), changes=changed.patch if changed else b"")
    name = name_of(settings.contestant)
    tracker: Tracker | None = None
    try:
        tracker = Tracker(
            settings.tracking,
            run_id=folder.id,
            name=f"{name}; {settings.task.name}, {settings.task.target}, seed {settings.seed}",
            group=settings.study,
            tags=[settings.task.name, settings.task.target],
            config=settings.plain(),
            folder=folder.path,
            axis="step",
            measures=("loss_first", "loss_last"),
            warn=warn,
            later=f"wandb sync {shlex.quote(str(folder.path))}/wandb/*run-*",
        )
        steps = settings.training.steps * settings.contestant.times
        with tqdm(total=steps, unit="step", desc=name, disable=None) as bar:
            result = compete(
                settings, device, tell=lambda row: bar.update(int(row["step"]) - bar.n)
            )
        summary = _summary(settings, folder.id, result)
        write_table(folder.path / ACCURACY, _accuracy_table(result))
        write_table(folder.path / HISTORY, pa.Table.from_pylist(result.history))
        write_json(folder.path / SUMMARY, summary)
        for row in result.history:
            tracker.log(row)
        tracker.summarize(summary)
        tracker.finish()
        folder.finish()
    except BaseException as error:
        if tracker is not None:
            tracker.finish(failed=True)
        message = record_failure(error, folder, shorten="task.tested_level")
        if isinstance(error, Exception):
            raise RunError(message) from error
        raise
    print(
        f"{folder.path}: {summary['task']} ({summary['target']}), {name}, seed {settings.seed}:"
        f" accuracy {summary['accuracy_trained']:.3f} at level {settings.task.trained_level},"
        f" {summary['accuracy_tested']:.3f} at level {settings.task.tested_level},"
        f" {result.seconds:.0f} s",
        flush=True,
    )


def _summary(settings: StateTrackingSettings, identity: str, result: Result) -> dict[str, Any]:
    full = result.accuracy[-1]
    solved = next((k for k, value in enumerate(full) if value < GOOD), len(full))
    return {
        "run_id": identity,
        "study": settings.study,
        "task": settings.task.name,
        "target": settings.task.target,
        "contestant": name_of(settings.contestant),
        "seed": settings.seed,
        "chance": make_task(settings.task.name, Target(settings.task.target)).chance,
        "accuracy_trained": full[settings.task.trained_level - 1],
        "accuracy_tested": full[-1],
        "solved_level": solved,  # the last one before accuracy first falls below GOOD
        "parameters": result.parameters,
        "layer_passes": result.layer_passes,
        "seconds": round(result.seconds, 2),
    }


def _accuracy_table(result: Result) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"depth": depth, "level": level, "accuracy": value}
            for depth, row in enumerate(result.accuracy)
            for level, value in enumerate(row, start=1)
        ]
    )


@hydra.main(config_path=CONF, config_name="state_tracking", version_base="1.3")
def _job(config: DictConfig) -> None:
    with saying_why():
        track(to_settings(config, StateTrackingSettings))


def _after(config: DictConfig) -> None:
    study = Path(config.runs_dir) / config.study
    if study.is_dir():
        figures = shlex.quote(str(Path("figures") / config.study))
        command = f"python -m analysis.state_tracking {shlex.quote(str(study))} --out {figures}"
        print(f"\nTables and figures:  {command}")


def main() -> int:
    return run_command(_job, after=_after)
