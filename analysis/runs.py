"""Everything saved as tidy frames: settings, measures and labels of runs, and their trajectories.

Knows what the columns mean, not where the runs come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.labels import said, with_labels
from analysis.models import Models, models_of
from analysis.read.run_folder import read_run
from analysis.read.saved import (
    MEASURES,
    PROMPT_COLUMNS,
    TEXT_COLUMNS,
    Found,
    LeftOut,
    NotData,
    SavedModel,
    SavedRun,
    SourceError,
)
from analysis.read.sources import read
from analysis.text import some

SECTIONS = ("seed", "model", "feedback", "recompute", "generation", "prompts")
# the settings that every study speaks of get short names; any other keeps its dotted key
SHORT_NAMES = {
    "feedback.kind": "kind",
    "feedback.strength": "strength",
    "feedback.layers": "layers",
    "feedback.shift": "shift",
    "feedback.hidden_strength": "hidden_strength",
    "model.name": "model",
    "recompute.solver": "solver",
    "recompute.iterations": "iterations_allowed",
    "recompute.tolerance": "tolerance",
    "recompute.damping": "damping",
    "recompute.start": "start",
    "generation.strategy": "strategy",
    "generation.max_new_tokens": "max_new_tokens",
    "generation.temperature": "temperature",
    "generation.top_k": "top_k",
    "device.dtype": "dtype",
}
ITERATION_KEYS = ("run", "prompt_id", "step", "iteration")
TEXT = pa.dictionary(pa.int32(), pa.string())
STEP = ["run", "prompt_id", "step"]


@dataclass(frozen=True)
class Runs:
    """The frames. `run` is a key that is unique over all sources, as `run_id` need not be.

    Attributes:
        runs: index run; run_id, study, every setting, commit, dirty, the measures over all prompts
            (nats), label, variant and group (see analysis.labels), ends_by_theorem (whether T - 1
            passes must settle it), lacking (what was not kept), off (measures switched off).
        settings: the columns of `runs` that can change a result.
        prompts: a row per run and prompt: run, PROMPT_COLUMNS and whatever else was recorded.
        iterations: run, prompt_id, step, iteration, MEASURES (nats; tokens for settled_prefix).
        models: trained models.
        contests: contestants of state tracking.
        left_out: what is not data, and why.
        repeated: ids of runs that several sources hold; each counts once.
    """

    runs: pd.DataFrame
    settings: tuple[str, ...]
    prompts: pd.DataFrame
    iterations: pd.DataFrame
    models: Models
    contests: Models
    left_out: tuple[LeftOut, ...]
    repeated: tuple[str, ...]
    saved: Mapping[int, SavedRun]

    @property
    def trajectory(self) -> pd.DataFrame:
        """run, prompt_id, step, iteration, position, token, log_prob of everything.

        ``log_prob`` is in nats, and missing at the first position of a text: nothing predicts it.
        Every file is read once, when first asked for; `damaged` names those that cannot be read.
        """
        return self._trajectories[0]

    @property
    def damaged(self) -> tuple[LeftOut, ...]:
        """Runs whose trajectory cannot be read, though its file looked whole."""
        return self._trajectories[1]

    @cached_property
    def estimates(self) -> pd.DataFrame:
        """A row per run, prompt, step and token: what the first and the last pass said of it.

        run, prompt_id, step, position, token, first and last (nats), plain (nats: `first`, where
        that pass was fed nothing), change (last - plain).
        """
        frame = self.trajectory
        passes = frame.groupby(STEP, observed=True)["iteration"]
        last = frame[frame["iteration"] == passes.transform("max")]
        first = frame[frame["iteration"] == passes.transform("min")]
        keys = [*STEP, "position"]
        made = last.merge(first[[*keys, "log_prob"]], on=keys, suffixes=("", "_first"))
        made = made.rename(columns={"log_prob": "last", "log_prob_first": "first"})
        start = self.runs.get("start", pd.Series(dtype=object)).reindex(self.runs.index)
        carried = made["run"].map(start == "carried") & (made["step"] > 0)
        made["plain"] = made["first"].mask(carried)
        return made.assign(change=made["last"] - made["plain"]).drop(columns="iteration")

    @cached_property
    def _trajectories(self) -> tuple[pd.DataFrame, tuple[LeftOut, ...]]:
        tables, damaged = [], []
        for run in self.runs.index:
            saved = self.saved[run]
            if saved.trajectory is None:
                continue
            try:
                tables.append(_table(saved.trajectory(), run))
            except (NotData, pa.ArrowException) as reason:
                why = " ".join(str(reason).split())
                damaged.append(LeftOut(run_id=saved.run_id, place=saved.place, reason=why))
        if not tables:
            columns = [*STEP, "iteration", "position", "token", "log_prob"]
            return pd.DataFrame(columns=columns), tuple(damaged)
        whole = pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
        frame = whole.to_pandas(ignore_metadata=True)
        frame["log_prob"] = frame["log_prob"].mask(_begins(frame))
        if set(frame["prompt_id"].cat.categories) > set(self.prompt_ids):
            frame = frame[frame["prompt_id"].isin(self.prompt_ids)].reset_index(drop=True)
        return frame, tuple(damaged)

    @cached_property
    def prompt_ids(self) -> tuple[str, ...]:
        """In the order in which the runs list them."""
        return tuple(self.prompts["prompt_id"].drop_duplicates())

    def only(self, *, run_ids: Sequence[str], prompt_ids: Sequence[str]) -> Runs:
        """The chosen runs and prompts; an empty choice means all. Unknown ids: SourceError.

        With chosen prompts, `runs` keeps no measures: they are over all prompts.
        """
        _check_known(
            "run",
            run_ids,
            [*self.runs["run_id"], *self.models.rows["run_id"], *self.contests.rows["run_id"]],
        )
        runs = self.runs[self.runs["run_id"].isin(run_ids)] if run_ids else self.runs
        prompts = self.prompts[self.prompts["run"].isin(runs.index)]
        if prompt_ids:
            _check_known("prompt", prompt_ids, [*prompts["prompt_id"]])
            prompts = prompts[prompts["prompt_id"].isin(prompt_ids)]
            runs = runs.loc[runs.index.isin(prompts["run"])]
            measures = [name for name in PROMPT_COLUMNS if name in runs]
            runs = runs.assign(**dict.fromkeys(measures, np.nan))
        models, contests = (kind.only(run_ids) for kind in (self.models, self.contests))
        chosen = replace(self, runs=runs, prompts=prompts, models=models, contests=contests)
        kept = self.iterations["prompt_id"].isin(prompts["prompt_id"].unique())
        return replace(chosen, iterations=self.iterations[kept]).where(runs.index)

    def where(self, runs: pd.Index) -> Runs:
        """The convergence runs with these keys."""
        return replace(
            self,
            runs=self.runs.loc[runs],
            prompts=self.prompts[self.prompts["run"].isin(runs)],
            iterations=self.iterations[self.iterations["run"].isin(runs)],
        )


def runs_of(sources: Sequence[str]) -> Runs:
    """Everything finished in the sources. SourceError if one cannot be read or is empty."""
    return _frames(read(sources))


def unfinished(folder: Path) -> Runs:
    """One run folder whose files are whole, whatever its status says. Raises NotData."""
    return _frames(Found((read_run(folder, finished=False),), ()))


def _frames(found: Found) -> Runs:
    saved, repeated = _once([run for run in found.runs if isinstance(run, SavedRun)])
    models = [run for run in found.runs if isinstance(run, SavedModel)]
    runs, settings = _runs(saved)
    by_key = {run: saved[int(place)] for run, place in enumerate(runs.pop("place"))}
    return Runs(
        runs=runs,
        settings=settings,
        prompts=_prompts(by_key),
        iterations=_iterations(by_key),
        models=models_of(models, "training"),
        contests=models_of(models, "state_tracking"),
        left_out=found.left_out,
        repeated=repeated,
        saved=by_key,
    )


def _once(runs: Sequence[SavedRun]) -> tuple[list[SavedRun], tuple[str, ...]]:
    """A run that lies in several places, by study and id, as the most complete of them has it."""
    kept: dict[tuple[str, str], SavedRun] = {}
    repeated: dict[str, None] = {}
    for run in runs:
        known = kept.setdefault((run.study, run.run_id), run)
        if known is not run:
            repeated[run.run_id] = None
            if known.lacking and not run.lacking:
                kept[run.study, run.run_id] = run
    return list(kept.values()), tuple(repeated)


def _runs(saved: Sequence[SavedRun]) -> tuple[pd.DataFrame, tuple[str, ...]]:
    flat = [_settings(run.config) for run in saved]
    settings = tuple(dict.fromkeys(["kind", "strength", *(key for one in flat for key in one)]))
    overall = [
        {
            key: value
            for key, value in _mapping(run.summary.get("overall")).items()
            if key not in one
        }
        for run, one in zip(saved, flat, strict=True)
    ]
    frame = pd.DataFrame(
        [
            {
                "run_id": run.run_id,
                "study": run.study,
                **one,
                "commit": run.status.get("commit"),
                "dirty": run.status.get("dirty"),
                "off": ", ".join(
                    k for k, v in _mapping(run.config.get("measures")).items() if v is False
                ),
                "lacking": run.lacking,
                "place": place,
            }
            for place, (run, one) in enumerate(zip(saved, flat, strict=True))
        ],
        columns=["run_id", "study", *settings, "commit", "dirty", "off", "lacking", "place"],
        dtype=object,
    )
    frame["kind"] = frame["kind"].map(lambda kind: str(kind) if said(kind) else "none")
    frame["strength"] = pd.to_numeric(frame["strength"], errors="coerce").astype(float)
    frame.loc[frame["kind"] == "none", "strength"] = np.nan  # without feedback it has no meaning
    measures = _typed(pd.DataFrame(overall, index=frame.index))
    frame = frame.join(
        measures.drop(columns=[c for c in ("prompt_id", "text", *frame) if c in measures])
    )
    frame = with_labels(frame, ("study", *settings), strength="strength")
    frame["ends_by_theorem"] = [_ends_by_theorem(row) for _, row in frame.iterrows()]
    frame.index.name = "run"
    return frame, settings


def _settings(config: Mapping[str, object]) -> dict[str, object]:
    """Every recorded setting that can change a result, by its short name."""
    kept = {name: config[name] for name in (*SECTIONS, "reporting_tolerance") if name in config}
    dtype = _mapping(config.get("device")).get("dtype")
    if dtype is not None:  # where it ran is not a setting, its precision is
        kept["device.dtype"] = dtype
    flat = pd.json_normalize(kept).iloc[0].to_dict() if kept else {}
    return {
        SHORT_NAMES.get(str(key), str(key)): ",".join(map(str, value))
        if isinstance(value, list)
        else value
        for key, value in flat.items()
    }


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as numbers, missing as missing; text stays text."""
    typed = frame.reindex(columns=list(dict.fromkeys((*PROMPT_COLUMNS, *frame.columns))))
    for name in PROMPT_COLUMNS:
        if name in TEXT_COLUMNS:
            typed[name] = typed[name].map(lambda v: v if isinstance(v, str) else None)
        else:
            typed[name] = pd.to_numeric(typed[name], errors="coerce").astype(float)
    return typed


def _prompts(saved: Mapping[int, SavedRun]) -> pd.DataFrame:
    rows = [
        {**prompt, "run": run, "prompt_id": str(prompt["prompt_id"])}
        for run, one in saved.items()
        for prompt in one.summary["prompts"]  # type: ignore[attr-defined]
    ]
    frame = _typed(pd.DataFrame(rows, columns=None if rows else ["run"]))
    return frame[["run", *frame.columns.drop("run")]]


def _iterations(saved: Mapping[int, SavedRun]) -> pd.DataFrame:
    parts = [one.iterations.assign(run=run) for run, one in saved.items()]
    columns = [*ITERATION_KEYS, *MEASURES]
    if not parts:
        return pd.DataFrame(columns=columns)
    frame = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    frame = frame.astype({"prompt_id": str, **dict.fromkeys(MEASURES, float)})
    return frame.sort_values(list(ITERATION_KEYS), kind="stable", ignore_index=True)


def _table(table: pa.Table, run: int) -> pa.Table:
    """The rows of one run in the types that all share."""
    columns = {"run": pa.array(np.full(len(table), run, dtype=np.int32))}
    for name in table.column_names:
        column = table[name]
        if name in ("prompt_id", "token"):
            if not pa.types.is_dictionary(column.type):
                column = column.cast(pa.string()).dictionary_encode()
            columns[name] = column.cast(TEXT)
        else:
            columns[name] = column if name == "log_prob" else column.cast(pa.int32())
    return pa.table(columns)


def _begins(frame: pd.DataFrame) -> pd.Series:
    """Which rows are the first position of their text: 0, until a window of a generation slides."""
    first = frame["position"] == 0
    later = frame[frame["step"] > 0]
    if len(later):
        least = later.groupby(STEP, observed=True)["position"].transform("min")
        first.loc[later.index] = later["position"] == least
    return first


def _ends_by_theorem(row: pd.Series) -> bool:
    """Strictly triangular and undamped: method.md, section 2."""
    same_position = row["kind"] == "hidden_state" and row.get("shift") == 0
    damping = row.get("damping")
    return not same_position and (not said(damping) or damping == 1.0)


def _check_known(noun: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        there = some(list(dict.fromkeys(known)))
        raise SourceError(f"There is no {noun} {', '.join(unknown)}; there are: {there}.")
