"""What W&B is told of a convergence run: everything, read from the run's own files.

Because nothing else is needed, a run can be told again at any time, to the same W&B run.
"""

import math
import os
import pkgutil
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.converge.records import MEASURES, Measures
from experiments.converge.settings import ConvergeSettings, TrackingSettings
from experiments.runs import folder as run_files
from experiments.runs.files import write_json
from experiments.settings import parse
from experiments.sweeps.report import name_of
from experiments.tracking.tracker import Tracker, warn

# the page of a run: the work of another room, named and not imported
PAGE = "analysis.page.build:page_of_run"
RUN_FOLDER = "run_folder"  # in the files of a W&B run: a copy of the run's own
MOST_TOKENS = 25  # curves that can still be told apart; W&B draws 100 at most
MOST_POINTS = 200  # of a curve; W&B shows tables of at most 10,000 rows

# logged as log10 too: W&B's axes are linear at first
LOG10 = ("step_max", "oracle_error_max")
# how the measures of several prompts become one history row an iteration
AGGREGATES = {name: "max" if name in LOG10 else "mean" for name in MEASURES}


def open_tracker(
    config: dict[str, Any],
    run_id: str,
    folder: Path,
    *,
    tracking: TrackingSettings,
    warn: Callable[[str], object] = warn,
    patience: float | None = None,
) -> Tracker:
    """A tracker for the run with this configuration; ``folder`` is where W&B keeps its files: the
    run's own, in its study, unless ``patience`` is given.

    Raises:
        KeyError, TypeError: the configuration is not that of a convergence run.
    """
    name, study = name_of(config), folder.parent
    measures = (*AGGREGATES, *(f"{measure}_log10" for measure in LOG10), "settled_share")
    tracker = Tracker(
        tracking,
        run_id=run_id,
        name=name,
        group=config["study"],
        tags=[config["model"]["name"], config["feedback"]["kind"]],
        config=config,
        folder=folder,
        axis="iteration",
        measures=dict.fromkeys(measures, "iteration") | {"generation/*": "generation_step"},
        warn=warn,
        later=f"python -m scripts.sync_wandb {shlex.quote(str(study))}",
        patience=patience,
    )
    if tracker.active and patience is None:
        _show_in_terminal(study, tracker.files.parent, f"{name} {run_id}")
    return tracker


def _show_in_terminal(study: Path, wandb_run: Path, name: str) -> None:
    """Keep ``<study>/wandb/`` for ``wandb leet``, which shows folders that are named
    run-DATE_TIME-NAME and hold a file run-NAME.wandb: links with names that people can read.

    A view that cannot be written is left as it is: it shows nothing that is not elsewhere.
    """
    when, _, run_id = wandb_run.name.removeprefix("offline-").rpartition("-")  # run-DATE_TIME
    # a shell splits at spaces
    readable = re.sub(r"[^A-Za-z0-9.=+_-]+", "_", name.replace("β", "beta"))
    stored = next(wandb_run.glob("*.wandb"), wandb_run / f"run-{run_id}.wandb")  # or will be
    view = study / "wandb"
    with suppress(OSError):
        view.mkdir(exist_ok=True)
        for shown in view.glob("run-*"):
            files = shown / "files"
            is_gone = files.is_symlink() and not files.exists()
            if is_gone or shown.name.endswith(f"_{run_id}"):
                shutil.rmtree(shown, ignore_errors=True)
        place = view / f"{when}-{readable}"
        place.mkdir()
        # relative, so that the study can be moved
        (place / f"run-{readable}.wandb").symlink_to(os.path.relpath(stored, place))
        (place / "files").symlink_to(os.path.relpath(wandb_run / "files", place))


class Live:
    """Tells W&B of a run while it is computed: a history row a pass, and one a generation step.

    Rows speak of the prompts of one batch; those at rest count on, as in ``history_rows``.

    W&B takes only rows whose step is above that of the last. That of a pass is where it would stand
    if every pass were run: the same whenever the run is told again, and the pass's own number in a
    run of one batch of fixed texts.
    """

    def __init__(self, tracker: Tracker, settings: ConvergeSettings) -> None:
        self._tracker = tracker
        # W&B's steps of a generation step, and of a prompt
        self._passes, self._steps = _steps_of(settings)
        self._last: dict[str, Any] | None = None
        self._done = 0  # prompts

    def end_batch(self, done: int) -> None:
        """``done``: how many prompts are."""
        self._end_step()
        self._done = done

    def __call__(self, step: int, number: int, measures: Measures, at_rest: int) -> None:
        """See ``Recorder``'s on_pass."""
        if not self._tracker.active:
            return
        if number == 1:
            self._end_step()
        row: dict[str, Any] = {"iteration": number}
        for name, how in AGGREGATES.items():
            known = [value for value in measures[name] if not math.isnan(value)]
            row[name] = float(getattr(np, how)(known)) if known else None
        self._last = with_logarithms(row) | {
            "step": step,
            "settled_share": at_rest / len(measures["nll"]),
        }
        before = self._done * self._steps + step * self._passes
        self._tracker.log(self._last, step=before + number)

    def _end_step(self) -> None:
        """The last pass over a generation step stands for the step."""
        if self._last is not None and self._last["step"] > 0:
            names = ("iteration", "nll", "kl_effect", "oracle_error_max")
            row = {f"generation/{name}": self._last[name] for name in names}
            row["generation_step"] = self._last["step"]
            self._tracker.log(row, step=self._tracker.step + 1)
            self._last = None


def _steps_of(settings: ConvergeSettings) -> tuple[int, int]:
    """W&B's steps of a generation step, which are every pass and one more, and of a prompt."""
    passes = settings.recompute.iterations + 1
    return passes, passes * (settings.generation.max_new_tokens + 1)


def _behind(folder: Path, prompts: int) -> int:
    """W&B's step behind which the rows of the whole run follow: 0 where they are those that
    ``Live`` tells, of one batch, of fixed texts, and of prefixes that settle to what was known
    beforehand.
    """
    batches = run_files.read_status(folder).get("batches")
    if batches is None:  # of a version that told it so
        return 0
    settings = parse(run_files.read_config(folder) or {}, ConvergeSettings)
    known = settings.measures.oracle and settings.feedback.shift == 1
    if known and batches == 1 and settings.generation.max_new_tokens == 0:
        return 0
    return prompts * _steps_of(settings)[1]


def publish(tracker: Tracker, folder: Path, summary: dict[str, Any]) -> None:
    """Log a run from its own files, what ``Live`` has told of it apart: a history row an iteration,
    summary, pictures, Parquet.
    """
    if not tracker.active:
        return
    behind, told = _behind(folder, len(summary["prompts"])), tracker.step
    for row in history_rows(folder):
        if row["iteration"] + behind > told:
            tracker.log(row, step=row["iteration"] + behind)
    # made here, so that no mistake of ours is told as W&B's
    page, curves = pkgutil.resolve_name(PAGE)(folder), _moving_tokens(folder)
    tracker.show("page", lambda wandb: wandb.Html(page, inject=False))
    tracker.show("token_trajectories", lambda wandb: wandb.plot.line_series(**curves))
    tracker.summarize(summary["overall"])  # last: a row overwrites what it shares with it
    artifact = (*run_files.TABLES, run_files.SUMMARY)
    tracker.keep_files(RUN_FOLDER, lambda place: _copy_run(folder, place), artifact=artifact)


def _moving_tokens(folder: Path) -> dict[str, Any]:
    """The curves of the tokens whose estimates move most at the last generation step of their
    prompt, as W&B draws them; in nats, missing where that is no number or the prompt has ended.
    """
    columns = ["prompt_id", "step", "iteration", "position", "token", "log_prob"]
    frame = _last_step(pq.read_table(folder / run_files.TRAJECTORY, columns=columns))
    index = ["prompt_id", "position", "token"]
    curves = frame.pivot(index=index, columns="iteration", values="log_prob")
    reach = (curves.max(axis=1) - curves.min(axis=1)).fillna(0.0)
    chosen = curves.loc[reach.sort_values(ascending=False, kind="stable").index[:MOST_TOKENS]]
    chosen = chosen.iloc[:, :: -(-chosen.shape[1] // MOST_POINTS)]
    values = chosen.to_numpy(np.float64)
    return {
        "xs": [int(x) for x in chosen.columns],
        "ys": [[float(y) if np.isfinite(y) else None for y in row] for row in values],
        "keys": [f"{token!r} {position} of {prompt}" for prompt, position, token in chosen.index],
        "title": f"log_prob of the {len(chosen)} of {len(curves)} tokens that move most",
        "xname": "iteration",
    }


def _copy_run(folder: Path, place: Path) -> None:
    """What a reader needs of a run, so that a W&B run copied elsewhere is complete by itself. It
    says that the run is finished: nothing is left to be computed.
    """
    for name in (run_files.CONFIG, *run_files.TABLES, run_files.SUMMARY):
        try:
            os.link(folder / name, place / name)  # the same bytes: files of a run are never edited
        except OSError:
            shutil.copyfile(folder / name, place / name)
    status = run_files.read_status(folder)
    if status["state"] == "running":
        status |= {"state": "finished", "finished": run_files.now()}
    write_json(place / run_files.STATUS, status)


def history_rows(folder: Path) -> list[dict[str, Any]]:
    """One row an iteration over all prompts, each at its last generation step; one that ended early
    counts on with the values it ended with.
    """
    import pandas as pd  # half a second, for which only runs that W&B is told of wait

    frame = _last_step(pq.read_table(folder / run_files.ITERATIONS))
    passes = pd.RangeIndex(1, frame["iteration"].max() + 1, name="iteration")
    texts = [text.set_index("iteration") for _, text in frame.groupby("prompt_id")]
    # what is missing where a text diverged stays missing
    filled = [text.reindex(passes, method="ffill") for text in texts]
    rows = {
        measure: getattr(pd.concat([text[measure] for text in filled], axis=1), how)(axis=1)
        for measure, how in AGGREGATES.items()
    }
    plain: Any = pd.DataFrame(rows).reset_index().astype(object)
    return [with_logarithms(row) for row in plain.where(plain.notna(), None).to_dict("records")]


def _last_step(table: pa.Table) -> Any:
    """The rows of the last generation step of each prompt, as a pandas frame."""
    frame = table.to_pandas()
    return frame[frame["step"] == frame.groupby("prompt_id")["step"].transform("max")]


def with_logarithms(row: dict[str, Any]) -> dict[str, Any]:
    """A history row with what is logged on a logarithmic axis, too; missing where it has none."""
    values = {measure: row[measure] or 0.0 for measure in LOG10}
    return row | {
        f"{measure}_log10": math.log10(value) if 0 < value < math.inf else None
        for measure, value in values.items()
    }
