"""Run one contest, into its folder."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from experiments.runs.compute_once import ALONE, Asked, compute_once, finished_already
from experiments.runs.files import short_hash, write_table
from experiments.runs.folder import ACCURACY, RunFolder
from experiments.state_tracking.contest import accuracy_by_depth, train_contestant
from experiments.state_tracking.settings import StateTrackingSettings
from experiments.state_tracking.tasks import make_task
from experiments.sweeps.report import contestant_of, name_of
from experiments.tracking.tracker import Tracker

HISTORY = "history.parquet"
GOOD = 0.9  # accuracy at which a level counts as solved


def locate(settings: StateTrackingSettings, known: object = None) -> RunFolder:
    """The run that these settings stand for, named by a hash of all that can change a result."""
    path = Path(settings.runs_dir, settings.study, short_hash(settings.deciding()))
    return RunFolder(path, settings.plain())


def track(settings: StateTrackingSettings, asked: Asked = ALONE) -> Path:
    """Run the contest of these settings unless that is done; returns the run folder. Raises
    ConfigError or, of a run that broke off, RunError.
    """
    device = settings.device.found()
    folder = locate(settings)
    if finished_already(folder):
        return folder.path
    chosen, contestant = settings.task, settings.contestant
    name = contestant_of(folder.config)

    def compute(tracker: Tracker) -> Callable[[], object]:
        task = make_task(chosen.name, chosen.target)
        started = time.process_time()
        with asked.progress(settings.training.steps * contestant.times, "step", name) as bar:
            model, history, passes = train_contestant(settings, task, device, on_step=bar.update)
        seconds = time.process_time() - started
        # depth 0 is all there is of a plain model; the last one is full recurrence
        depth = chosen.tested_level - 1 if contestant.passes > 1 else 0
        accuracy = accuracy_by_depth(model, task, words=settings.test_words, depth=depth)
        full = accuracy[-1]
        summary: dict[str, Any] = {
            "run_id": folder.id,
            "study": settings.study,
            "task": chosen.name,
            "target": chosen.target,
            "contestant": name,
            "seed": settings.seed,
            "accuracy_trained": full[chosen.trained_level - 1],
            "accuracy_tested": full[-1],
            # the last one before accuracy first falls below GOOD
            "solved_level": next((k for k, share in enumerate(full) if share < GOOD), len(full)),
            "chance": task.chance,  # of always giving the most frequent answer
            "parameters": model.count_parameters(),
            "layer_passes": passes * contestant.layers,  # evaluated in training, per window
            "seconds": round(seconds, 2),  # of processor time, in training
        }
        rows = [
            {"depth": depth, "level": level, "accuracy": value}
            for depth, row in enumerate(accuracy)
            for level, value in enumerate(row, start=1)
        ]
        write_table(folder.path / ACCURACY, pa.Table.from_pylist(rows))
        write_table(folder.path / HISTORY, pa.Table.from_pylist(history))
        folder.summarize(summary)

        def publish() -> None:
            for row in history:
                tracker.log(row)
            tracker.summarize(summary)

        return publish

    compute_once(
        folder,
        asked=asked,
        device=device,
        open_tracker=lambda: Tracker(
            settings.tracking,
            run_id=folder.id,
            name=f"{name_of(folder.config)}, seed {settings.seed}",
            group=settings.study,
            tags=[chosen.name, chosen.target],
            config=folder.config,
            folder=folder.path,
            axis="step",
            measures={"loss_*": "step"},
        ),
        compute=compute,
        shorten="task.tested_level",
    )
    return folder.path
