"""Everything saved as tidy frames: settings, measures and labels of runs, and their trajectories.

Knows what the columns mean, not where the runs come from.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.labels import CONTENTS, fed, with_labels
from analysis.models import Models, models_of
from analysis.read.run_folder import flat
from analysis.read.saved import (
    MEASURES,
    PROMPT_COLUMNS,
    TRAJECTORY_COLUMNS,
    LeftOut,
    NotData,
    SavedModel,
    SavedRun,
    SourceError,
)
from analysis.text import some

SECTIONS = ("seed", "model", "feedback", "recompute", "generation", "prompts")
# the settings that every study speaks of go by their last part; any other keeps its dotted key
FAMILIAR = {
    "feedback": ("kind", "strength", "layers", "shift", "hidden_strength"),
    "recompute": ("solver", "tolerance", "damping", "start"),
    "generation": ("strategy", "max_new_tokens", "temperature", "top_k"),
    "device": ("dtype",),
}
SHORT_NAMES = {f"{section}.{name}": name for section, names in FAMILIAR.items() for name in names}
SHORT_NAMES |= {"model.name": "model", "recompute.iterations": "iterations_allowed"}
# what a setting was before there was a key for it: of runs whose early version recorded none
FORMERLY = {
    "hidden_strength": 0.0,
    "generation.slide": 1,
    "prompts.split": "text",
    "model.library": "stateful_gpt",
}
STEP = ["run", "prompt_id", "step"]
TYPES = dict.fromkeys(("prompt_id", "token"), pa.dictionary(pa.int32(), pa.string()))
TYPES |= dict.fromkeys(("step", "iteration", "position"), pa.int32())


@dataclass(frozen=True)
class Runs:
    """The frames. `run` is a key that is unique over all sources, as `run_id` need not be.

    Attributes:
        runs: index run; run_id, study, every setting, commit, dirty, the measures over all prompts
            (nats), change (mean over the prompts that have one), label, variant and group (see
            analysis.labels), ends_by_theorem (whether T - 1 passes must settle it), lacking (what
            was not kept), off (measures switched off).
        settings: the columns of `runs` that can change a result.
        prompts: a row per run and prompt: run, PROMPT_COLUMNS, change (nll less nll_plain), and
            whatever else was recorded.
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

    def __repr__(self) -> str:
        texts = len(set(self.prompts["prompt_id"]))
        frames = "runs, prompts, iterations, trajectory, estimates, models, contests"
        return f"<{len(self.runs)} runs of {texts} texts: {frames}>"

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
        last, first = (frame[frame["iteration"] == passes.transform(end)] for end in ("max", "min"))
        keys = [*STEP, "position"]
        made = last.rename(columns={"log_prob": "last"}).drop(columns="iteration")
        made = made.merge(first.rename(columns={"log_prob": "first"})[[*keys, "first"]], on=keys)
        carried = (self.setting("start") == "carried") & fed(self.runs)
        made["plain"] = made["first"].mask(made["run"].map(carried) & (made["step"] > 0))
        return made.assign(change=made["last"] - made["plain"])

    @cached_property
    def _trajectories(self) -> tuple[pd.DataFrame, tuple[LeftOut, ...]]:
        tables, damaged = [], []
        for run in self.runs.index:
            saved = self.saved[run]
            if saved.trajectory is None:
                continue
            try:
                table = saved.trajectory()
                types = [(field.name, TYPES.get(field.name, field.type)) for field in table.schema]
                numbers = pa.array(np.full(len(table), run, dtype=np.int32))
                tables.append(table.cast(pa.schema(types)).add_column(0, "run", numbers))
            except (NotData, pa.ArrowException) as reason:
                why = " ".join(str(reason).split())
                damaged.append(LeftOut(run_id=saved.run_id, place=saved.place, reason=why))
        if not tables:
            return pd.DataFrame(columns=["run", *TRAJECTORY_COLUMNS]), tuple(damaged)
        whole = pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
        frame = whole.to_pandas()
        frame["log_prob"] = frame["log_prob"].mask(_begins(frame))
        if not set(frame["prompt_id"].cat.categories) <= set(self.prompt_ids):
            frame = frame[frame["prompt_id"].isin(self.prompt_ids)].reset_index(drop=True)
        return frame, tuple(damaged)

    @property
    def run_ids(self) -> list[str]:
        """Of runs, models and contestants."""
        frames = (self.runs, self.models.rows, self.contests.rows)
        return [run_id for frame in frames for run_id in frame["run_id"].unique()]

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        """In the order in which the runs list them."""
        return tuple(self.prompts["prompt_id"].unique())

    def setting(self, name: str) -> pd.Series:
        """By run; missing where it was not recorded."""
        return self.runs.reindex(columns=[name])[name]

    def only(self, *, run_ids: Sequence[str] = (), prompt_ids: Sequence[str] = ()) -> "Runs":
        """The chosen runs and prompts; an empty choice means all. Unknown ids: SourceError.

        With chosen prompts, `runs` keeps no measures: they are over all prompts.
        """
        chosen = self
        if run_ids:
            _check_known("run", run_ids, self.run_ids)
            chosen = replace(
                self.where(self.runs.index[self.runs["run_id"].isin(run_ids)]),
                models=self.models.where(self.models.rows["run_id"].isin(run_ids)),
                contests=self.contests.where(self.contests.rows["run_id"].isin(run_ids)),
            )
        if prompt_ids:
            _check_known("prompt", prompt_ids, chosen.prompt_ids)
            prompts = chosen.prompts[chosen.prompts["prompt_id"].isin(prompt_ids)]
            iterations = chosen.iterations[chosen.iterations["prompt_id"].isin(prompt_ids)]
            measures = [name for name in (*PROMPT_COLUMNS, "change") if name in chosen.runs]
            runs = chosen.runs.assign(**dict.fromkeys(measures, np.nan))
            chosen = replace(chosen, runs=runs, prompts=prompts, iterations=iterations)
            chosen = chosen.where(runs.index[runs.index.isin(prompts["run"])])
        return chosen

    def where(self, runs: pd.Index) -> "Runs":
        """The convergence runs with these keys."""
        prompts = self.prompts[self.prompts["run"].isin(runs)]
        iterations = self.iterations[self.iterations["run"].isin(runs)]
        return replace(self, runs=self.runs.loc[runs], prompts=prompts, iterations=iterations)


def frames_of(found: Sequence[SavedRun | SavedModel], left_out: tuple[LeftOut, ...] = ()) -> Runs:
    """What was saved, as frames; what lies in several places counts once, as its best copy."""

    def what(one: SavedRun | SavedModel) -> Hashable:
        if isinstance(one, SavedRun):
            return one.study, one.run_id
        return one.run_id, repr(one.settings), one.curve.to_csv()  # a name may be given twice

    copies = Counter(map(what, found))
    # the most complete comes last
    order = sorted(found, key=lambda one: isinstance(one, SavedRun) and one.lacking is None)
    kept = {what(one): one for one in order}
    models = [one for one in kept.values() if isinstance(one, SavedModel)]
    frame, settings = _runs([one for one in kept.values() if isinstance(one, SavedRun)])
    saved: dict[int, SavedRun] = dict(enumerate(frame.pop("saved")))
    prompts = _prompts(saved)
    parts = [one.iterations.assign(run=run) for run, one in saved.items()]
    iterations = pd.concat(parts) if parts else pd.DataFrame()
    iterations = iterations.reindex(columns=[*STEP, "iteration", *MEASURES])
    # not of the means over prompts: one that diverged has the plain model's loss alone
    frame["change"] = prompts.groupby("run")["change"].mean()
    return Runs(
        runs=frame,
        settings=settings,
        prompts=prompts,
        iterations=iterations.sort_values([*STEP, "iteration"], kind="stable", ignore_index=True),
        models=models_of(models, "training"),
        contests=models_of(models, "state_tracking"),
        left_out=left_out,
        repeated=tuple(one.run_id for key, one in kept.items() if copies[key] > 1),
        saved=saved,
    )


def _runs(saved: Sequence[SavedRun]) -> tuple[pd.DataFrame, tuple[str, ...]]:
    chosen = [_settings(run.config) for run in saved]
    settings = tuple(dict.fromkeys(["kind", "strength", *(key for one in chosen for key in one)]))
    rows = [
        {
            "run_id": run.run_id,
            "study": run.study,
            **{name: value for name, value in FORMERLY.items() if name in settings},
            **one,
            "commit": run.status.get("commit"),
            "dirty": run.status.get("dirty"),
            "off": ", ".join(
                key.removeprefix("measures.")
                for key, value in flat(run.config).items()
                if value is False and key.startswith("measures.")
            ),
            "lacking": run.lacking,
            "texts": None  # a history alone has none
            if run.trajectory is None
            else str([(text["prompt_id"], text.get("text")) for text in run.summary["prompts"]]),
            "weights": str(run.status.get("model_hash") or "") or None,
            "saved": run,
        }
        for run, one in zip(saved, chosen, strict=True)
    ]
    about = ["commit", "dirty", "off", "lacking", *CONTENTS, "saved"]
    frame = pd.DataFrame(rows, columns=["run_id", "study", *settings, *about], dtype=object)
    frame["kind"] = frame["kind"].where(frame["kind"].notna(), "none").astype(str)
    frame["strength"] = pd.to_numeric(frame["strength"], errors="coerce").astype(float)
    frame.loc[frame["kind"] == "none", "strength"] = np.nan  # without feedback it has no meaning
    measures = _typed(pd.DataFrame([run.summary["overall"] for run in saved], index=frame.index))
    frame = frame.join(measures.drop(columns=["run", "prompt_id", "text", *frame], errors="ignore"))
    frame = with_labels(frame, ("study", *settings)).rename_axis("run")
    # strictly triangular and undamped: method.md, section 2
    known = frame.reindex(columns=["shift", "damping"]).apply(pd.to_numeric, errors="coerce")
    frame["ends_by_theorem"] = known["shift"].ne(0) & known["damping"].fillna(1.0).eq(1.0)
    return frame, (*settings, *frame.columns.intersection([*CONTENTS]))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every recorded setting that can change a result, by its short name."""
    sections = (*SECTIONS, "reporting_tolerance", "device")
    kept = flat({name: config[name] for name in sections if name in config})
    return {
        SHORT_NAMES.get(key, key): value
        for key, value in kept.items()
        if key == "device.dtype" or not key.startswith("device")  # where it ran is no setting
    }


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as numbers, missing as missing; text stays text."""
    typed = frame.reindex(columns=list(dict.fromkeys((*PROMPT_COLUMNS, *frame.columns))))
    for name, kind in PROMPT_COLUMNS.items():
        if kind is str:
            typed[name] = typed[name].map(lambda v: v if isinstance(v, str) else None)
        else:
            typed[name] = pd.to_numeric(typed[name], errors="coerce").astype(float)
    return typed


def _prompts(saved: Mapping[int, SavedRun]) -> pd.DataFrame:
    rows = [
        {**prompt, "run": run, "prompt_id": str(prompt["prompt_id"])}
        for run, one in saved.items()
        for prompt in one.summary["prompts"]
    ]
    frame = _typed(pd.DataFrame(rows, columns=None if rows else ["run"]))
    frame["change"] = frame["nll"] - frame["nll_plain"]
    return frame[["run", *frame.columns.drop("run")]]


def _begins(frame: pd.DataFrame) -> pd.Series:
    """Which rows are the first position of their text: 0, until a window of a generation slides."""
    first = frame["position"] == 0
    later = frame[frame["step"] > 0]
    least = later.groupby(STEP, observed=True)["position"].transform("min")
    first.loc[later.index] = later["position"] == least
    return first


def last_step(frame: pd.DataFrame) -> pd.DataFrame:
    """Of a row for each run, prompt and step, or more: those of the text as it ended."""
    steps = frame.groupby(["run", "prompt_id"], observed=True)["step"]
    return frame[frame["step"] == steps.transform("max")]


def _check_known(noun: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SourceError(f"There is no {noun} {', '.join(unknown)}; there are: {some(known)}.")
