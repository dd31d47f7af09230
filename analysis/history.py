"""A run of which only W&B's history is left: measures over all prompts, no trajectory.

Configuration, summary and history rows come from a log or from a server; this knows neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.saved import ALL_PROMPTS, MEASURES, PROMPT_COLUMNS, NotData, SavedRun

COLUMNS = ("iteration", *MEASURES)
MOST_ITERATIONS = 2**31


def from_history(
    *,
    run_id: str,
    study: str,
    place: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    lacking: str,
    commit: str | None = None,
) -> SavedRun:
    """As much of a run as its history tells. Raises NotData where there is no row to tell it."""
    frame = pd.DataFrame([{name: row.get(name) for name in COLUMNS} for row in history])
    frame = frame.reindex(columns=list(COLUMNS)).apply(_numbers)
    frame = frame[frame["iteration"].between(1, MOST_ITERATIONS)]
    if frame.empty:
        raise NotData(f"{lacking}, and no history of iterations")
    # a run that was resumed logs again what it had logged before
    frame = frame.drop_duplicates("iteration", keep="last").sort_values("iteration")
    ended = "outcome" in summary  # until then, W&B's summary repeats the last row of the history
    overall = {key: summary[key] for key in PROMPT_COLUMNS if ended and _plain(summary.get(key))}
    tolerance = config.get("reporting_tolerance")
    told = {"reporting_tolerance": tolerance if _plain(tolerance) else None, **overall}
    return SavedRun(
        run_id=run_id,
        study=str(config.get("study") or study or "unknown"),
        place=place,
        config={key: value for key, value in config.items() if not key.startswith("_")},
        status={"commit": commit},
        summary={
            "run_id": run_id,
            "overall": overall,
            "prompts": [{**told, "prompt_id": ALL_PROMPTS}],
        },
        iterations=frame.astype({"iteration": int}).assign(prompt_id=ALL_PROMPTS, step=0),
        trajectory=None,
        lacking=lacking,
    )


def _numbers(column: pd.Series) -> pd.Series:
    """Anything that is no number is missing: a log may hold what it likes."""
    return pd.Series(
        [value if isinstance(value, int | float) else None for value in column], dtype=float
    )


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float)
