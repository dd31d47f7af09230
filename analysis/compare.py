"""Compares two trajectories of the same settings, estimate by estimate.

Knows nothing of how either was made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow.dataset as ds

KEYS = ["prompt_id", "step", "iteration", "position"]


@dataclass(frozen=True)
class Comparison:
    """What became of every stored estimate when it was computed again."""

    estimates: int  # stored
    prompts: int
    differing: int  # estimates of other bits, over those that both have
    largest: float  # nats; infinite where one of two is no number
    where: str  # of the largest difference
    mismatch: str | None  # why the two do not hold the same tokens at all

    @property
    def exact(self) -> bool:
        return self.mismatch is None and self.differing == 0


def compare(stored: ds.Dataset, again: ds.Dataset) -> Comparison:
    """By prompt, step, iteration and position."""
    old, new = _rows(stored), _rows(again)
    mismatch = _mismatch(old, new)
    both = old.merge(new, on=KEYS, suffixes=("", "_again"))
    before, after = both["log_prob"].to_numpy(), both["log_prob_again"].to_numpy()
    same = _bits(before) == _bits(after) if before.dtype == after.dtype else before == after
    with np.errstate(invalid="ignore"):  # infinity less infinity
        apart = np.where(same, 0.0, np.abs(before.astype(float) - after.astype(float)))
    apart = np.where(np.isnan(apart), np.inf, apart)  # nats
    where = ""
    if len(both):
        row = both.loc[int(np.argmax(apart))]
        where = (
            f"prompt {row['prompt_id']}, step {row['step']}, iteration {row['iteration']}, "
            f"position {row['position']}"
        )
    return Comparison(
        estimates=len(old),
        prompts=old["prompt_id"].nunique(),
        differing=int((~same).sum()),
        largest=float(apart.max(initial=0.0)),
        where=where,
        mismatch=mismatch,
    )


def _rows(trajectory: ds.Dataset) -> pd.DataFrame:
    wanted = [
        *KEYS,
        "log_prob",
        *(n for n in ("token_id", "token") if n in trajectory.schema.names),
    ]
    frame = trajectory.to_table(columns=wanted).to_pandas(ignore_metadata=True)
    return frame.astype({"prompt_id": str}).sort_values(KEYS, ignore_index=True)


def _bits(values: np.ndarray) -> np.ndarray:
    """As whole numbers: 0 and -0 differ, and what is no number equals itself."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _mismatch(old: pd.DataFrame, new: pd.DataFrame) -> str | None:
    if old["log_prob"].dtype != new["log_prob"].dtype:
        return f"estimates are {new['log_prob'].dtype} instead of {old['log_prob'].dtype}"
    if len(old) != len(new):
        return f"there are {len(new)} estimates instead of {len(old)}"
    if not old[KEYS].equals(new[KEYS]):
        return "prompts, steps or passes are others"
    name = "token_id" if "token_id" in old and "token_id" in new else "token"
    other = np.flatnonzero(old[name].to_numpy() != new[name].to_numpy())
    if len(other):
        row = old.loc[int(other[0])]
        return (
            f"prompt {row['prompt_id']} has another token at step {row['step']}, "
            f"position {row['position']}"
        )
    return None
