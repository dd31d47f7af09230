"""What every reader hands over: saved runs and models, what it left out, why a source is no good.

Knows the shape of a record, not where it is kept: folders and trackers are the readers' business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa

MEASURES = (
    "step_max",
    "step_rms",
    "settled_prefix",
    "oracle_error_max",
    "nll",
    "kl_step",
    "kl_effect",
    "hidden_step_norm",
)
PROMPT_COLUMNS = {
    "prompt_id": str,
    "text": str,
    "prompt_tokens": float,
    "generated_tokens": float,
    "generated_text": str,
    "outcome": str,
    "iterations": float,
    "iterations_to_tolerance": float,
    "reporting_tolerance": float,
    "rate": float,
    "lyapunov": float,
    "nll": float,
    "nll_plain": float,
    "kl_effect": float,
    "oracle_error_max": float,
    "seconds": float,
}
TRAJECTORY_COLUMNS = ["prompt_id", "step", "iteration", "position", "token", "log_prob"]
# where only values over all prompts were kept, they stand in for the prompts under this name
ALL_PROMPTS = "(all prompts)"


class SourceError(Exception):
    """A source, or a wish about it, that cannot be served; its text is one sentence."""


class NotData(Exception):
    """What lies here is not finished and readable; the text says why in a few words."""


@dataclass(frozen=True)
class SavedRun:
    """One convergence run: its records, its measures, and its trajectory, read on demand."""

    run_id: str
    study: str
    place: str  # where it is kept; two sources that share a place hold the same run
    config: Mapping[str, Any]
    status: Mapping[str, Any]
    summary: Mapping[str, Any]
    iterations: pd.DataFrame  # prompt_id, step, iteration and whichever MEASURES were recorded
    trajectory: Callable[[], pa.Table] | None  # TRAJECTORY_COLUMNS, or NotData; None: not kept
    lacking: str | None = None  # what was not kept, in a few words; None: the run is complete


@dataclass(frozen=True)
class SavedModel:
    """One trained model, of `experiments.train` or of a state-tracking contest."""

    run_id: str
    place: str
    kind: str  # "training" or "state_tracking"
    settings: Mapping[str, Any]  # by dotted key
    facts: Mapping[str, Any]  # what is said of it as a whole
    curve: pd.DataFrame  # depth, and nll and kl, or level and accuracy


@dataclass(frozen=True)
class LeftOut:
    """A run that is not data, with the reason in a few words."""

    run_id: str
    place: str
    reason: str
