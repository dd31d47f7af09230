"""Saved runs of any source, as one tidy set of frames.

`load(sources)` gives one row per run, one per run and prompt, one per run, prompt, step and
iteration, and the trajectories on demand. A new kind of source is one new reader module and one
line in READERS. Knows nothing of figures, and never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import folders, run_folder, wandb_folder, wandb_server
from analysis.news import left_out_line
from analysis.runs import Runs
from analysis.saved import MEASURES, PROMPT_COLUMNS, Found, LeftOut, SavedRun, SourceError

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
TEXT_COLUMNS = frozenset({"prompt_id", "text", "generated_text", "outcome"})


@dataclass(frozen=True)
class Reader:
    """One kind of source."""

    accepts: Callable[[str], bool]
    read: Callable[[str], Found]


READERS = (
    Reader(accepts=wandb_server.accepts, read=wandb_server.read),
    Reader(accepts=wandb_folder.accepts_file, read=wandb_folder.read_file),
    Reader(accepts=folders.accepts, read=folders.read),
)


def load(sources: Sequence[str]) -> Runs:
    """Every finished run of every source. SourceError if one cannot be read or is empty.

    A run that several sources hold, by study and run id, counts once: as the first of them has it,
    unless a later one is more complete.
    """
    found = [_read(source) for source in sources]
    places: dict[str, SavedRun] = {run.place: run for one in found for run in one.runs}
    saved: dict[tuple[str, str], SavedRun] = {}
    repeated: dict[str, None] = {}
    for run in places.values():
        known = saved.setdefault((run.study, run.run_id), run)
        if known is not run:
            repeated[run.run_id] = None
            if known.lacking and not run.lacking:
                saved[run.study, run.run_id] = run
    left_out = {item.place: item for one in found for item in one.left_out}
    if not saved:
        reasons = left_out_line(tuple(left_out.values()))
        raise SourceError(f"{', '.join(sources)}: there is no finished run. {reasons}".strip())
    return _frames(tuple(saved.values()), tuple(left_out.values()), tuple(repeated))


def load_unfinished(folder: Path) -> Runs:
    """One run folder whose files are whole, whatever its status says. Raises saved.NotData."""
    return _frames((run_folder.read_run(folder, finished=False),), (), ())


def _read(source: str) -> Found:
    for reader in READERS:
        if reader.accepts(source):
            return reader.read(source)
    if Path(source).exists():
        raise SourceError(
            f"{source}: this is a file; give a run folder, a study folder or a .wandb file."
        )
    raise SourceError(f"{source}: there is no such folder.")


def _frames(
    saved: tuple[SavedRun, ...], left_out: tuple[LeftOut, ...], repeated: tuple[str, ...]
) -> Runs:
    flat = [_settings(run.config) for run in saved]
    settings = tuple(dict.fromkeys(key for one in flat for key in one))
    rows = [
        {
            "run_id": run.run_id,
            "study": run.study,
            **one,
            "commit": run.status.get("commit"),
            "dirty": run.status.get("dirty"),
        }
        for run, one in zip(saved, flat, strict=True)
    ]
    runs = pd.DataFrame(rows, dtype=object).reindex(
        columns=["run_id", "study", *settings, "commit", "dirty"]
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
        repeated=repeated,
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
        {**prompt, "run": key, "prompt_id": str(prompt["prompt_id"])}
        for key, run in saved.items()
        for prompt in run.summary["prompts"]  # type: ignore[attr-defined]
    ]
    return _typed(pd.DataFrame(rows))


def _overall(saved: Mapping[int, SavedRun]) -> pd.DataFrame:
    rows = []
    for key, run in saved.items():
        overall = run.summary.get("overall")
        rows.append({**(overall if isinstance(overall, dict) else {}), "run": key})
    return _typed(pd.DataFrame(rows))


def _iterations(saved: Mapping[int, SavedRun]) -> pd.DataFrame:
    keys = ("run", "prompt_id", "step", "iteration")
    parts = [run.iterations.assign(run=key) for key, run in saved.items()]
    frame = pd.concat(parts, ignore_index=True).reindex(columns=[*keys, *MEASURES])
    frame = frame.astype({"prompt_id": str, **dict.fromkeys(MEASURES, float)})
    return frame.sort_values(list(keys), kind="stable", ignore_index=True)
