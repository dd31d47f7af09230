"""Run one contest, into its folder."""

import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from experiments.runs.compute_once import ALONE, Asked, compute_once, finished_already, warn
from experiments.runs.files import short_hash, write_json, write_table
from experiments.runs.folder import SUMMARY, RunFolder
from experiments.settings import ConfigError
from experiments.state_tracking.contest import compete
from experiments.state_tracking.settings import StateTrackingSettings
from experiments.sweeps.report import contestant_of, name_of
from experiments.tracking.tracker import Tracker
from stateful_gpt.device import choose_device

ACCURACY = "accuracy.parquet"
HISTORY = "history.parquet"
GOOD = 0.9  # accuracy at which a level counts as solved


def run_id(settings: StateTrackingSettings) -> str:
    """A short hash of everything that can change a result."""
    return short_hash(settings.deciding())


def locate(settings: StateTrackingSettings, known: dict[str, Any] | None = None) -> RunFolder:
    """The run that these settings stand for."""
    path = Path(settings.runs_dir) / settings.study / run_id(settings)
    return RunFolder(path, settings.plain())


def track(settings: StateTrackingSettings, asked: Asked = ALONE) -> Path:
    """Run the contest of these settings unless that is done; returns the run folder.

    Raises:
        ConfigError: settings that cannot be.
        RunError: the run broke off.
    """
    try:
        device = choose_device(settings.device.name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    folder = locate(settings)
    name = contestant_of(folder.config)
    if finished_already(folder):
        return folder.path

    def compute(_: object) -> tuple[list[dict[str, float]], dict[str, Any]]:
        steps = settings.training.steps * settings.contestant.times
        description = ": ".join(filter(None, (asked.place, name)))
        disable = None if asked.bar else True  # None: off where nobody watches
        with tqdm(total=steps, unit="step", desc=description, disable=disable) as bar:
            accuracy, history, facts = compete(
                settings, device, tell=lambda row: bar.update(int(row["step"]) - bar.n)
            )
        rows = [
            {"depth": depth, "level": level, "accuracy": value}
            for depth, row in enumerate(accuracy)
            for level, value in enumerate(row, start=1)
        ]
        full, task = accuracy[-1], settings.task
        summary = {
            "run_id": folder.id,
            "study": settings.study,
            "task": task.name,
            "target": task.target,
            "contestant": name,
            "seed": settings.seed,
            "accuracy_trained": full[task.trained_level - 1],
            "accuracy_tested": full[-1],
            # the last one before accuracy first falls below GOOD
            "solved_level": next((k for k, share in enumerate(full) if share < GOOD), len(full)),
            **facts,
        }
        write_table(folder.path / ACCURACY, pa.Table.from_pylist(rows))
        write_table(folder.path / HISTORY, pa.Table.from_pylist(history))
        write_json(folder.path / SUMMARY, summary)
        return history, summary

    def publish(tracker: Tracker, computed: tuple[list[dict[str, float]], dict[str, Any]]) -> None:
        history, summary = computed
        for row in history:
            tracker.log(row)
        tracker.summarize(summary)

    compute_once(
        folder,
        asked=asked,
        device=device,
        open_tracker=lambda: Tracker(
            settings.tracking,
            run_id=folder.id,
            name=f"{name_of(folder.config)}, seed {settings.seed}",
            group=settings.study,
            tags=[settings.task.name, settings.task.target],
            config=folder.config,
            folder=folder.path,
            axis="step",
            measures=("loss_*",),
            warn=warn,
            later=f"wandb sync {shlex.quote(str(folder.path))}/wandb/*run-*",
        ),
        compute=compute,
        publish=publish,
        shorten="task.tested_level",
    )
    return folder.path
