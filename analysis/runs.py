"""A set of saved runs as tidy frames, with the trajectories on demand.

Knows what the columns mean, not where the runs come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from analysis.news import some
from analysis.saved import LeftOut, SavedRun, SourceError


@dataclass(frozen=True)
class Grid:
    """Every token's estimate by iteration, for one run, prompt and generation step."""

    step: int
    iterations: np.ndarray  # (N,) int
    positions: np.ndarray  # (T,) int, absolute in the text
    tokens: tuple[str, ...]  # T
    log_prob: np.ndarray  # (T, N) nats; NaN where a row is missing or not a number

    @property
    def movement(self) -> np.ndarray:
        """(T,) nats: how far each estimate travelled in all, up and down added."""
        travelled = np.abs(np.diff(self.log_prob, axis=1))
        return np.where(np.isfinite(travelled), travelled, 0.0).sum(axis=1)


@dataclass(frozen=True)
class Runs:
    """The frames. `run` is a key that is unique over all sources, as `run_id` need not be."""

    runs: pd.DataFrame  # index run: run_id, study, every setting, commit, dirty
    settings: tuple[str, ...]  # the columns of `runs` that can change a result
    summaries: pd.DataFrame  # run, PROMPT_COLUMNS and whatever else was recorded
    overall: pd.DataFrame  # run, the same over all prompts of a run
    iterations: pd.DataFrame  # run, prompt_id, step, iteration, MEASURES (nats; tokens for one)
    left_out: tuple[LeftOut, ...]
    repeated: tuple[str, ...]  # the ids of runs that several sources hold; each counts once
    saved: Mapping[int, SavedRun]

    @cached_property
    def prompt_ids(self) -> tuple[str, ...]:
        """In the order in which the runs list them."""
        return tuple(self.summaries["prompt_id"].drop_duplicates())

    def only(self, *, run_ids: Sequence[str], prompt_ids: Sequence[str]) -> Runs:
        """The chosen runs and prompts; an empty choice means all. Unknown ids: SourceError."""
        keys = self.runs.index
        if run_ids:
            _check_known("run", run_ids, tuple(self.runs["run_id"].drop_duplicates()))
            keys = self.runs.index[self.runs["run_id"].isin(run_ids)]
        chosen = self.summaries["run"].isin(keys)
        if prompt_ids:
            _check_known("prompt", prompt_ids, tuple(self.summaries["prompt_id"][chosen].unique()))
        wanted = tuple(prompt_ids) or self.prompt_ids

        def pick(frame: pd.DataFrame) -> pd.DataFrame:
            return frame[frame["run"].isin(keys) & frame["prompt_id"].isin(wanted)]

        return replace(
            self,
            runs=self.runs.loc[keys],
            summaries=pick(self.summaries),
            iterations=pick(self.iterations),
            overall=self.overall[self.overall["run"].isin(keys)],
        )

    @cached_property
    def _last_steps(self) -> dict[tuple[int, str], int]:
        return self.iterations.groupby(["run", "prompt_id"], sort=False)["step"].max().to_dict()

    def last_step(self, run: int, prompt_id: str) -> int:
        """The last generation step that was recorded; 0 for a fixed text."""
        return int(self._last_steps.get((run, prompt_id), 0))

    def trajectory(
        self, run: int, prompt_id: str, *, columns: Sequence[str], step: int | None = None
    ) -> pd.DataFrame:
        """The rows of one run and prompt, and of one step if given: only these columns are read."""
        table = self._table(run, prompt_id, columns=columns, step=step)
        return table.to_pandas(ignore_metadata=True)

    def _table(
        self, run: int, prompt_id: str, *, columns: Sequence[str], step: int | None
    ) -> pa.Table:
        wanted = ds.field("prompt_id") == prompt_id
        if step is not None:
            wanted = wanted & (ds.field("step") == step)
        saved = self.saved[run]
        if saved.trajectory is None:
            raise SourceError(f"Run {saved.run_id} has no trajectory: {saved.lacking}.")
        try:
            return saved.trajectory.to_table(columns=list(columns), filter=wanted)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise SourceError(
                f"The trajectory of run {saved.run_id} cannot be read ({type(error).__name__})."
            ) from error

    def token_count(self, run: int, prompt_id: str) -> int | None:
        """T: the tokens that one pass of the last step covers; None without a trajectory."""
        if self.saved[run].trajectory is None:
            return None
        columns = ("iteration", "position")
        step = self.last_step(run, prompt_id)
        rows = self.trajectory(run, prompt_id, columns=columns, step=step)
        return int((rows["iteration"] == rows["iteration"].min()).sum())

    def grid(self, run: int, prompt_id: str, *, step: int | None = None) -> Grid:
        """Estimates by token and iteration at one step (by default the last)."""
        at = self.last_step(run, prompt_id) if step is None else step
        columns = ("iteration", "position", "token", "log_prob")
        table = self._table(run, prompt_id, columns=columns, step=at)
        iterations, column = np.unique(table["iteration"].to_numpy(), return_inverse=True)
        positions, first, row = np.unique(
            table["position"].to_numpy(), return_index=True, return_inverse=True
        )
        log_prob = np.full((len(positions), len(iterations)), np.nan)
        log_prob[row, column] = table["log_prob"].to_numpy()
        tokens = tuple(str(token) for token in table["token"].take(first).to_pylist())
        return Grid(
            step=at, iterations=iterations, positions=positions, tokens=tokens, log_prob=log_prob
        )


def _check_known(noun: str, wanted: Sequence[str], known: tuple[str, ...]) -> None:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SourceError(f"There is no {noun} {', '.join(unknown)}; there are: {some(known)}.")
