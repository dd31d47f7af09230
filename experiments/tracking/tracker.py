"""Tells Weights & Biases about a run that is already safe in its own files.

A tracker can lose nothing and stop nothing: whatever goes wrong with it is one warning, and once
its server has failed, the other runs of the process go on offline without asking it again.
"""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.converge.settings import TrackingSettings
from experiments.runs.files import write_json
from experiments.settings import ConfigError

# all that a study ever waits for a server that fails; W&B's own process gets what it needs
INIT_SECONDS = 5.0
FINISH_SECONDS = 7.0
LONG_SECONDS = 60.0  # offline, or to begin a run for whoever has patience

SYNCED = "synced.json"  # beside W&B's files of a run: where it has been uploaded to
LOGIN = "there is no API key (wandb login makes one known)"


def warn(message: str) -> None:
    """A line on the terminal that leaves a progress bar whole."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


class Tracker:
    """One W&B run, or nothing when tracking is disabled or broken.

    Args:
        axis: the column of a row that is W&B's step, too, where no other is given, so that a row
            which W&B's server has already is not added a second time.
        measures: over which column each measure is drawn.
        later: the command that uploads what could not be.
        patience: seconds that the server may take to end a run, for whoever has nothing else to do
            than to upload: that never goes on offline.
    """

    server_failed = False  # what this process has learned about W&B's server

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
        measures: Mapping[str, str],
        warn: Callable[[str], object] = warn,
        later: str | None = None,
        patience: float | None = None,
    ) -> None:
        self.online = settings.mode == "online" and not (Tracker.server_failed and not patience)
        self.step = 0  # W&B's, of the last row
        self._run: Any = None
        self._folder, self._axis, self._measures = folder, axis, measures
        self._warn, self._patience = warn, patience
        self._later = later or f"wandb sync {shlex.quote(str(folder))}/wandb/*run-*"
        if settings.mode == "disabled":
            return
        # what W&B stages outside a run's files stays with the run
        os.environ["WANDB_DATA_DIR"] = str((folder / "wandb" / "data").resolve())
        described = {
            **{"project": settings.project, "entity": settings.entity, "id": run_id},
            **{"name": name, "group": group, "tags": [tag[:64] for tag in tags]},
            **{"config": config, "dir": str(folder)},
        }
        started = self._attempt(lambda: self._open(described), "could not start")
        if not started and self.online and patience is None:
            self.online = False
            shutil.rmtree(folder / "wandb", ignore_errors=True)  # what it began online
            self._attempt(lambda: self._open(described), "could not start")

    @property
    def active(self) -> bool:
        """Whether there is still somebody to tell."""
        return self._run is not None

    @property
    def files(self) -> Path:
        """The folder of the files that belong to the W&B run. Only while it is active."""
        return Path(self._run.dir)

    def log(self, row: dict[str, Any], *, step: int | None = None) -> None:
        """One history row, at any time while the run computes; missing values are left out.
        ``step`` is W&B's, above that of the row before; None: where the row is on the axis.
        """
        self.step = int(row[self._axis]) if step is None else step
        known = {key: value for key, value in row.items() if value is not None}
        self._attempt(lambda: self._run.log(known, step=self.step), "lost a row")

    def summarize(self, values: dict[str, Any]) -> None:
        self._attempt(lambda: self._run.summary.update(values), "lost the summary")

    def show(self, key: str, make: Callable[[Any], object]) -> None:
        """A page or some curves, in the row after the last; ``make`` makes it with W&B's module."""
        import wandb

        step = self.step + 1
        self._attempt(lambda: self._run.log({key: make(wandb)}, step=step), f"lost {key}")

    def keep_files(
        self, name: str, fill: Callable[[Path], object], *, artifact: Collection[str]
    ) -> None:
        """Files that belong to the W&B run itself; ``fill`` puts them into the folder ``name``.
        Those named in ``artifact`` are one, too. Nobody may change them any more.
        """
        import wandb

        def send() -> None:
            place = self.files / name
            place.mkdir()
            fill(place)
            self._run.save(str(place / "*"), base_path=self._run.dir, policy="now")
            made = wandb.Artifact(f"run-{self._run.id}", type="run")
            for file in artifact:
                made.add_file(str(place / file), policy="immutable", skip_cache=True)
            self._run.log_artifact(made)

        self._attempt(send, f"lost the files {name}")

    def finish(self, *, failed: bool = False) -> bool:
        """Hand over what is left; returns whether W&B has got everything."""

        def end() -> None:
            place = {name: getattr(self._run, name) for name in ("entity", "project", "id")}
            self._run.finish(exit_code=int(failed))
            if self.online and not failed:
                write_json(self._folder / "wandb" / SYNCED, {"server": server_url(), **place})

        delivered = self._attempt(end, "could not finish")
        self._run = None
        return delivered

    def _open(self, described: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        # W&B logs beside the run: a full disk there is said once, by us
        logging.raiseExceptions = False
        import wandb  # takes a second: only where it is used

        if self.online and not has_login():
            raise wandb.errors.UsageError(LOGIN)
        in_sweep = "WANDB_SWEEP_ID" in os.environ  # W&B names the runs of its own sweeps
        begin, end = (INIT_SECONDS, FINISH_SECONDS) if self.online else (LONG_SECONDS,) * 2
        if self._patience is not None:
            begin, end = min(self._patience, LONG_SECONDS), self._patience
        run = wandb.init(
            **described,
            mode="online" if self.online else "offline",
            resume="allow" if self.online and not in_sweep else None,
            reinit="create_new",
            settings=wandb.Settings(
                init_timeout=begin,
                finish_timeout=end,
                finish_timeout_raises=True,
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,
                x_save_requirements=False,  # of all packages takes longer than all else
            ),
        )
        run.define_metric(self._axis, hidden=True)
        for measure, axis in self._measures.items():
            run.define_metric(measure, step_metric=axis)
        if not any((self._folder / "wandb").glob("*run-*")):
            raise OSError(f"W&B does not write to {self._folder}")
        self._run = run

    def _attempt(self, action: Callable[[], None], consequence: str) -> bool:
        """Whether it was done; if not, this run is told nothing any more."""
        if self._run is None and consequence != "could not start":
            return False
        try:
            action()
            return True
        except Exception as error:  # W&B raises many kinds; none of them may end a study
            self._run = None
            timed_out = isinstance(error, TimeoutError)  # then W&B has given up by itself
            if not timed_out:
                stop_helper()
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            if not self.online or (isinstance(error, OSError) and not timed_out):
                reason = f"W&B {consequence} ({reason}); the run folder is complete without it"
            elif self._patience is None:
                Tracker.server_failed = True
                reason = f"W&B goes on offline: {reason}; upload later with: {self._later}"
            self._warn(reason)
            return False


def has_login() -> bool:
    """Whether W&B knows an API key, from wherever it takes one; nobody is asked for it."""
    with _asking() as wandb:
        wandb.setup(wandb.Settings(mode="online"))  # or WANDB_MODE=offline hides the key
        return "WANDB_IDENTITY_TOKEN_FILE" in os.environ or wandb.login(prompt=False, verify=False)


def server_url() -> str:
    """Where W&B's server is, by the environment or W&B's own settings."""
    with _asking() as wandb:
        return str(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).rstrip("/")


@contextmanager
def _asking() -> Iterator[Any]:
    """W&B's module, silent. Raises ConfigError where what it is told outside of this project, such
    as by WANDB_API_KEY, cannot be.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb  # takes a second: only where it is used

    try:
        yield wandb
    except (wandb.Error, ValueError) as error:
        said = " ".join(str(error).split()).partition(" [type=")[0]  # pydantic's type of mistake
        raise ConfigError(f"W&B says: {said}") from None


def stop_helper() -> None:
    """End W&B's process, so that nothing of a broken run is left; the next run starts another."""
    import wandb

    with suppress(Exception, SystemExit):  # it raises whatever that process died of
        wandb.teardown(exit_code=1)
