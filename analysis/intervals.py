"""Means with their uncertainty: 95 % bootstrap intervals, the same for the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.frames import last_step

RESAMPLES = 2000
LEVEL = 95.0  # %
LEAST_TEXTS = 8  # fewer texts say too little of texts: their tokens are resampled instead


@dataclass(frozen=True)
class Interval:
    """A mean, where it lies with 95 %, and over what: `380 tokens of 4 texts`."""

    mean: float
    low: float
    high: float
    over: str

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def paired(estimates: pd.DataFrame) -> Interval | None:
    """The change of the loss (nats/token) against the plain model, token by token.

    Tokens of one text are averaged first, as a run's own nll is, and those of several runs (other
    seeds, repeats) before that. Whole texts are resampled, or the tokens within each text where
    there are fewer than 8. None if no token has a change.

    Args:
        estimates: of runs of one setting, as `Runs.estimates` has them; the last step counts.
    """
    known = last_step(estimates).dropna(subset=["change"]).astype({"change": float})
    worse = -known.groupby(["prompt_id", "position"], observed=True)["change"].mean()
    texts = [group.to_numpy() for _, group in worse.groupby(level=0, observed=True)]
    if not texts or not np.isfinite(worse).all():
        return None
    rng = np.random.default_rng(0)
    means = np.array([text.mean() for text in texts])
    if len(texts) >= LEAST_TEXTS:
        drawn = _resampled(means, rng)
    else:
        drawn = np.mean([_resampled(text, rng) for text in texts], axis=0)
    low, high = np.percentile(drawn, [50 - LEVEL / 2, 50 + LEVEL / 2])
    over = f"{len(worse)} tokens of {len(texts)} text{'s' if len(texts) > 1 else ''}"
    return Interval(float(means.mean()), float(low), float(high), over)


def _resampled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(RESAMPLES,) means of as many values drawn with replacement."""
    parts = np.array_split(range(RESAMPLES), 1 + RESAMPLES * len(values) // 2**20)  # texts are long
    sizes = [(len(part), len(values)) for part in parts]
    return np.concatenate([values[rng.integers(size[1], size=size)].mean(axis=1) for size in sizes])
