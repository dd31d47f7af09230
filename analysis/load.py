"""Saved runs of any source, as one tidy set of frames.

`load(sources)` gives one row per run, one per run and prompt, one per run, prompt, step and
iteration, and the trajectories on demand. A new kind of source is one new reader module and one
line in READERS. Knows nothing of figures, and never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from analysis import run_folder
from analysis.saved import MEASURES, Found, LeftOut, SavedRun, SourceError

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
    "recompute.iterations": "iterations",
    "recompute.tolerance": "tolerance",
    "recompute.damping": "damping",
    "recompute.start": "start",
    "generation.strategy": "strategy",
    "generation.max_new_tokens": "max_new_tokens",
    "generation.temperature": "temperature",
    "generation.top_k": "top_k",
    "device.dtype": "dtype",
}
PROMPT_COLUMNS = (
    "prompt_id",
    "text",
    "prompt_tokens",
    "generated_tokens",
    "generated_text",
    "outcome",
    "iterations",
    "iterations_to_tolerance",
    "reporting_tolerance",
    "rate",
    "lyapunov",
    "nll",
    "nll_plain",
    "kl_effect",
    "oracle_error_max",
    "seconds",
)
TEXT_COLUMNS = frozenset({"prompt_id", "text", "generated_text", "outcome"})
COUNTS = ("prompt_tokens", "generated_tokens", "iterations", "iterations_to_tolerance")


@dataclass(frozen=True)
class Reader:
    """One kind of source."""

    accepts: Callable[[str], bool]
    read: Callable[[str], Found]


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

    def last_step(self, run: int, prompt_id: str) -> int:
        """The last generation step that was recorded; 0 for a fixed text."""
        frame = self.iterations
        steps = frame["step"][(frame["run"] == run) & (frame["prompt_id"] == prompt_id)]
        return int(steps.max()) if len(steps) else 0

    def trajectory(
        self, run: int, prompt_id: str, *, columns: Sequence[str], step: int | None = None
    ) -> pd.DataFrame:
        """The rows of one run and prompt, and of one step if given: only these columns are read."""
        wanted = ds.field("prompt_id") == prompt_id
        if step is not None:
            wanted = wanted & (ds.field("step") == step)
        saved = self.saved[run]
        try:
            return saved.trajectory.to_table(columns=list(columns), filter=wanted).to_pandas()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise SourceError(
                f"The trajectory of run {saved.run_id} cannot be read ({type(error).__name__})."
            ) from error

    def token_count(self, run: int, prompt_id: str) -> int:
        """T: the tokens that one pass of the last step covers."""
        columns = ("iteration", "position")
        step = self.last_step(run, prompt_id)
        rows = self.trajectory(run, prompt_id, columns=columns, step=step)
        return int((rows["iteration"] == rows["iteration"].min()).sum())

    def grid(self, run: int, prompt_id: str, *, step: int | None = None) -> Grid:
        """Estimates by token and iteration at one step (by default the last)."""
        at = self.last_step(run, prompt_id) if step is None else step
        columns = ("iteration", "position", "token", "log_prob")
        rows = self.trajectory(run, prompt_id, columns=columns, step=at)
        iterations, column = np.unique(rows["iteration"].to_numpy(), return_inverse=True)
        positions, first, row = np.unique(
            rows["position"].to_numpy(), return_index=True, return_inverse=True
        )
        log_prob = np.full((len(positions), len(iterations)), np.nan)
        log_prob[row, column] = rows["log_prob"].to_numpy()
        tokens = tuple(str(token) for token in rows["token"].iloc[first])
        return Grid(
            step=at, iterations=iterations, positions=positions, tokens=tokens, log_prob=log_prob
        )


READERS = (Reader(accepts=run_folder.accepts, read=run_folder.read),)


def load(sources: Sequence[str]) -> Runs:
    """Every finished run of every source. SourceError if one cannot be read or is empty."""
    found = [_read(source) for source in sources]
    left_out = {item.place: item for one in found for item in one.left_out}
    saved = {run.place: run for one in found for run in one.runs}
    if not saved:
        reasons = describe_left_out(tuple(left_out.values()))
        raise SourceError(f"{', '.join(sources)}: there is no finished run. {reasons}".strip())
    return _frames(tuple(saved.values()), tuple(left_out.values()))


def load_unfinished(folder: Path) -> Runs:
    """One run folder whose files are whole, whatever its status says. Raises run_folder.NotData."""
    return _frames((run_folder.read_run(folder, finished=False),), ())


def describe_left_out(left_out: Sequence[LeftOut]) -> str:
    """One line that counts and names the runs that are not data, or nothing."""
    if not left_out:
        return ""
    noun = "run that is" if len(left_out) == 1 else "runs that are"
    names = ", ".join(f"{item.run_id} ({item.reason})" for item in left_out)
    return f"Left out {len(left_out)} {noun} not finished and whole: {names}."


def _read(source: str) -> Found:
    for reader in READERS:
        if reader.accepts(source):
            if any(Path(source).glob("*.wandb")):
                break
            return reader.read(source)
    if source.startswith("wandb:"):
        raise SourceError(f"{source}: reading from a W&B server is not supported yet.")
    if Path(source).suffix == ".wandb" or Path(source).is_dir():
        raise SourceError(f"{source}: reading an offline W&B run is not supported yet.")
    if Path(source).exists():
        raise SourceError(f"{source}: this is a file; give a run folder or a study folder.")
    raise SourceError(f"{source}: there is no such folder.")


def _check_known(noun: str, wanted: Sequence[str], known: tuple[str, ...]) -> None:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        shown = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
        raise SourceError(f"There is no {noun} {', '.join(unknown)}; there are: {shown}.")


def _frames(saved: tuple[SavedRun, ...], left_out: tuple[LeftOut, ...]) -> Runs:
    flat = [_settings(run.config) for run in saved]
    settings = tuple(dict.fromkeys(key for one in flat for key in one))
    rows = [
        {
            "run_id": run.run_id,
            "study": run.study,
            **one,
            "commit": run.status.get("commit"),
            "dirty": run.status.get("dirty"),
            "finished": run.status.get("finished"),
        }
        for run, one in zip(saved, flat, strict=True)
    ]
    runs = pd.DataFrame(rows, dtype=object).reindex(
        columns=["run_id", "study", *settings, "commit", "dirty", "finished"]
    )
    for name in ("kind", "strength"):  # a run that recorded none still has its place in the order
        if name not in runs:
            runs[name] = None
    runs["kind"] = runs["kind"].map(lambda kind: "none" if kind is None else str(kind))
    runs["strength"] = pd.to_numeric(runs["strength"], errors="coerce").astype(float)
    runs.loc[runs["kind"] == "none", "strength"] = np.nan  # without feedback it has no meaning
    order = runs.assign(place=[run.place for run in saved]).sort_values(
        ["study", "kind", "strength", "run_id", "place"], kind="stable"
    )
    runs = runs.loc[order.index].reset_index(drop=True)
    runs.index.name = "run"
    by_key = {key: saved[index] for key, index in enumerate(order.index)}
    return Runs(
        runs=runs,
        settings=tuple(dict.fromkeys(("kind", "strength", *settings))),
        summaries=_summaries(by_key),
        overall=_overall(by_key),
        iterations=_iterations(by_key),
        left_out=left_out,
        saved=by_key,
    )


def _settings(config: Mapping[str, object]) -> dict[str, object]:
    """Every recorded setting that can change a result, by its short name."""
    flat: dict[str, object] = {}

    def walk(key: str, value: object) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(f"{key}.{name}", inner)
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            flat[SHORT_NAMES.get(key, key)] = text

    for section in SECTIONS:
        if section in config:
            walk(section, config[section])
    device = config.get("device")
    if isinstance(device, Mapping) and "dtype" in device:
        flat["dtype"] = device["dtype"]  # where it ran is not a setting, its precision is
    return flat


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as numbers, missing as missing; text stays text."""
    wanted = dict.fromkeys(("run", *PROMPT_COLUMNS, *frame.columns))
    typed = frame.reindex(columns=list(wanted))
    for name in PROMPT_COLUMNS:
        if name not in TEXT_COLUMNS:
            typed[name] = pd.to_numeric(typed[name], errors="coerce").astype(float)
    return typed


def _summaries(saved: Mapping[int, SavedRun]) -> pd.DataFrame:
    rows = [
        {"run": key, **prompt, "prompt_id": str(prompt["prompt_id"])}
        for key, run in saved.items()
        for prompt in run.summary["prompts"]  # type: ignore[attr-defined]
    ]
    return _typed(pd.DataFrame(rows))


def _overall(saved: Mapping[int, SavedRun]) -> pd.DataFrame:
    rows = []
    for key, run in saved.items():
        overall = run.summary.get("overall")
        rows.append({"run": key, **(overall if isinstance(overall, dict) else {})})
    return _typed(pd.DataFrame(rows))


def _iterations(saved: Mapping[int, SavedRun]) -> pd.DataFrame:
    columns = ["run", "prompt_id", "step", "iteration", *MEASURES]
    parts = []
    for key, run in saved.items():
        part = run.iterations.assign(run=key).reindex(columns=columns)
        parts.append(part.astype(dict.fromkeys(MEASURES, float)))
    return pd.concat(parts, ignore_index=True).sort_values(
        ["run", "prompt_id", "step", "iteration"], kind="stable", ignore_index=True
    )
