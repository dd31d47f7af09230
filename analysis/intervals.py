"""Means with their uncertainty: 95 % bootstrap intervals, the same for the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


def paired(
    estimates: pd.DataFrame, groups: pd.Series, *, by_prompt: bool = False
) -> dict[Any, Interval]:
    """The change of the loss (nats/token) against the plain model, token by token, of each group.

    Tokens of one text are averaged first, as a run's own nll is, and those of several runs (other
    seeds, repeats) before that. Whole texts are resampled, or the tokens within each text where
    there are fewer than 8. What has no token with a change has no interval.

    Args:
        estimates: as `Runs.estimates` has them; the last step counts.
        groups: by run, the group that it is a repeat of; a run that is not in it does not count.
        by_prompt: an interval for each (group, prompt_id), not for each group.
    """
    known = last_step(estimates[estimates["run"].isin(groups.index)]).dropna(subset=["change"])
    keys = [known["run"].map(groups), known["prompt_id"], known["position"]]
    worse = -known["change"].astype(float).groupby(keys, observed=True).mean()
    sizes = worse.groupby(level=[0, 1], observed=True).size()
    texts = np.split(worse.to_numpy(), sizes.cumsum().to_numpy()[:-1])
    found: dict[Any, list[np.ndarray]] = {}
    for (group, prompt), text in zip(sizes.index, texts, strict=False):  # none splits into one
        found.setdefault((group, str(prompt)) if by_prompt else group, []).append(text)
    alike: dict[tuple[int, ...], list[Any]] = {}  # of the same lengths: they share what is drawn
    for key, members in found.items():
        if all(np.isfinite(text).all() for text in members):
            alike.setdefault(tuple(map(len, members)), []).append(key)
    return {
        key: interval
        for keys in alike.values()
        for key, interval in zip(keys, _intervals([found[key] for key in keys]), strict=True)
    }


def _intervals(groups: Sequence[Sequence[np.ndarray]]) -> Iterator[Interval]:
    """Of groups whose texts have the same lengths, one after the other."""
    rng = np.random.default_rng(0)
    means = np.array([[text.mean() for text in texts] for texts in groups])
    if means.shape[1] >= LEAST_TEXTS:
        drawn = _resampled(means, rng)
    else:
        drawn = np.mean([_resampled(np.array(t), rng) for t in zip(*groups, strict=True)], axis=0)
    ends = np.percentile(drawn, [50 - LEVEL / 2, 50 + LEVEL / 2], axis=1)
    tokens, count = sum(map(len, groups[0])), len(groups[0])
    over = f"{tokens} tokens of {count} text{'s' if count > 1 else ''}"
    for mean, low, high in zip(means.mean(axis=1), *ends, strict=True):
        yield Interval(float(mean), float(low), float(high), over)


def _resampled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(groups, RESAMPLES) means of as many of (groups, n) values drawn with replacement."""
    count = values.shape[1]
    parts = np.array_split(range(RESAMPLES), 1 + RESAMPLES * count // 2**20)  # texts are long
    drawn = (rng.integers(count, size=(len(part), count)) for part in parts)
    means = [[one[places].mean(axis=1) for one in values] for places in drawn]
    return np.concatenate(means, axis=1)
