"""Tells Weights & Biases about a run that is already safe in its own files.

A tracker can lose nothing and stop nothing: whatever goes wrong with it is one warning.
"""

import io
import os
import shutil
import socket
import urllib.parse
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from experiments.config import TrackingSettings
from experiments.files import read_json, write_json
from experiments.run_folder import CONFIG, ITERATIONS, STATUS, SUMMARY, TRAJECTORY, now

PROBE_SECONDS = 2.0
INIT_SECONDS = 5.0
FINISH_SECONDS = 5.0
RUN_FOLDER = "run_folder"  # in the files of a W&B run: a copy of the run's own

# how the measures of several prompts (and steps) become one history row an iteration
AGGREGATES = {
    "step_max": "max",
    "step_rms": "mean",
    "settled_prefix": "mean",
    "oracle_error_max": "max",
    "nll": "mean",
    "kl_step": "mean",
    "kl_effect": "mean",
}


class Tracker:
    """One W&B run, or nothing when tracking is disabled or broken.

    ``axis`` is the column of a row that its ``measures`` are drawn over.
    """

    def __init__(
        self,
        settings: TrackingSettings,
        *,
        run_id: str,
        name: str,
        group: str,
        tags: list[str],
        config: dict[str, Any],
        folder: Path,
        axis: str,
        measures: Collection[str],
        warn: Callable[[str], object],
    ) -> None:
        self._warn = warn
        self._run: Any = None
        self._folder = folder
        self._axis = axis
        self._measures = measures
        if settings.mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        # staged artifacts stay with the run; each run sets its own place
        os.environ["WANDB_DATA_DIR"] = str((folder / "wandb" / "data").resolve())
        mode = settings.mode
        if mode == "online" and not reachable():
            self._warn_offline("the server does not answer")
            mode = "offline"
        self._attempt(
            lambda: self._open(settings, mode, run_id, name, group, tags, config), "could not start"
        )
        if self._run is None and mode == "online":
            self._warn_offline("the server refuses the run")
            self._attempt(
                lambda: self._open(settings, "offline", run_id, name, group, tags, config),
                "could not start",
            )

    @property
    def active(self) -> bool:
        """Whether there is still somebody to tell."""
        return self._run is not None

    def log(self, row: dict[str, Any]) -> None:
        """One history row; missing values are left out."""
        known = {key: value for key, value in row.items() if value is not None}
        self._attempt(lambda: self._run.log(known), "lost a row")

    def summarize(self, values: dict[str, Any]) -> None:
        self._attempt(lambda: self._run.summary.update(values), "lost the summary")

    def image(self, key: str, draw: Callable[[], bytes]) -> None:
        """A picture; ``draw`` makes its PNG, and only where somebody will see it."""

        def send() -> None:
            import wandb
            from PIL import Image

            self._run.log({key: wandb.Image(Image.open(io.BytesIO(draw())))})

        self._attempt(send, f"lost the figure {key}")

    def artifact(self, name: str, kind: str, files: list[Path]) -> None:
        def send() -> None:
            import wandb

            artifact = wandb.Artifact(name, type=kind)
            for file in files:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)

        self._attempt(send, f"lost the artifact {name}")

    def keep_files(self, name: str, fill: Callable[[Path], object]) -> None:
        """Files that belong to the W&B run itself; ``fill`` puts them into the folder ``name``."""

        def send() -> None:
            place = Path(self._run.dir) / name
            place.mkdir()
            fill(place)
            self._run.save(str(place / "*"), base_path=self._run.dir, policy="now")

        self._attempt(send, f"lost the files {name}")

    def finish(self, *, failed: bool = False) -> None:
        self._attempt(lambda: self._run.finish(exit_code=int(failed)), "could not finish")
        self._run = None

    def _open(
        self,
        settings: TrackingSettings,
        mode: str,
        run_id: str,
        name: str,
        group: str,
        tags: list[str],
        config: dict[str, Any],
    ) -> None:
        import wandb  # takes a second: only where it is used

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            id=run_id,
            name=name,
            group=group,
            tags=[tag[:64] for tag in tags],
            config=config,
            dir=str(self._folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,
            ),
        )
        self._run.define_metric(self._axis, hidden=True)
        for measure in self._measures:
            self._run.define_metric(measure, step_metric=self._axis)
        if not any((self._folder / "wandb").glob("*run-*")):
            raise OSError(f"W&B does not write to {self._folder}")

    def _attempt(self, action: Callable[[], object], consequence: str) -> None:
        if self._run is None and consequence != "could not start":
            return
        try:
            action()
        except Exception as error:  # W&B raises many kinds; none of them may end a study
            self._run = None
            if isinstance(error, ConnectionError):
                _let_go()
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            self._warn(f"W&B {consequence} ({reason}); the run folder is complete without it")

    def _warn_offline(self, reason: str) -> None:
        self._warn(
            f"W&B goes on offline: {reason}; later, upload with: wandb sync"
            f" {self._folder}/wandb/offline-run-*"
        )


def _let_go() -> None:
    """W&B's helper process has died: the next run gets another, and the exit is quiet."""
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown()


def reachable() -> bool:
    """Whether something accepts connections where W&B's server should be."""
    url = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False


def publish(tracker: Tracker, folder: Path, summary: dict[str, Any]) -> None:
    """Log a run from its own files: a history row an iteration, summary, heat map, Parquet."""
    if not tracker.active:
        return
    for row in history_rows(folder):
        tracker.log(row)
    tracker.summarize(summary["overall"])
    tracker.keep_files(RUN_FOLDER, lambda place: _copy_run(folder, place))
    tracker.image("heat_map", lambda: _heat_map(folder))
    tracker.artifact(
        f"run-{folder.name}",
        "run",
        [folder / name for name in (TRAJECTORY, ITERATIONS, SUMMARY)],
    )


def _copy_run(folder: Path, place: Path) -> None:
    """What a reader needs of a run, so that a W&B run copied elsewhere is complete by itself.

    The copy says that the run is finished: it is told when there is nothing left to be computed.
    """
    for name in (CONFIG, TRAJECTORY, ITERATIONS, SUMMARY):
        try:
            os.link(folder / name, place / name)  # the same bytes: files of a run are never edited
        except OSError:
            shutil.copyfile(folder / name, place / name)
    status = read_json(folder / STATUS)
    if status["state"] == "running":
        status |= {"state": "finished", "finished": now()}
    write_json(place / STATUS, status)


def _heat_map(folder: Path) -> bytes:
    from analysis.figures import heat_map_png  # Matplotlib takes a second: only where it draws
    from analysis.load import load_unfinished

    return heat_map_png(load_unfinished(folder))


def history_rows(folder: Path) -> list[dict[str, Any]]:
    """One row an iteration over all prompts, each at its last generation step.

    A prompt that ended early counts on with the values it ended with.
    """
    frame = pq.read_table(folder / ITERATIONS).to_pandas()
    last = frame["step"] == frame.groupby("prompt_id")["step"].transform("max")
    frame = frame[last].set_index(["iteration", "prompt_id"])
    filled = frame[list(AGGREGATES)].unstack("prompt_id").sort_index().ffill()
    rows = []
    for iteration in filled.index:
        row: dict[str, Any] = {"iteration": int(iteration)}
        for measure, how in AGGREGATES.items():
            values = filled.loc[iteration, measure].dropna()
            row[measure] = float(getattr(values, how)()) if len(values) else None
        rows.append(row)
    return rows
