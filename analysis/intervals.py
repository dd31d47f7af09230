"""Runs of one setting as one, for the table, the page and figures alike: means, outcomes, and 95 %
bootstrap intervals of the change of the loss, the same for the same numbers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.runs import last_step

MEANS = ["tokens", "iterations_to_tolerance", "rate", "lyapunov", "nll", "change", "kl_effect"]
RESAMPLES = 2000
LEAST_TEXTS = 8  # fewer texts say too little of texts: their tokens are resampled instead


@dataclass(frozen=True)
class Interval:
    """A mean, where it lies with 95 %, and over what: `32 texts`, or `380 tokens of 4 texts`."""

    mean: float
    low: float
    high: float
    over: str

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def pooled(
    rows: pd.DataFrame, by: Sequence[str], *, first: Sequence[str], changes: Mapping[Any, Interval]
) -> pd.DataFrame:
    """A row for each of `by`, in the order in which they appear.

    Of the first row of each: the columns `first`. Over all of them: runs (how many), outcome
    (`settled`, or `2 settled, 1 cycle`), and the MEANS there are. Passes to tolerance are missing
    unless every run got there. Where `changes` has an interval, change is its mean, half its half.
    """
    measures = [name for name in MEANS if name in rows]
    groups = rows.groupby(list(by), sort=False)
    made = groups[[*first]].first(skipna=False)
    made["runs"] = groups.size()
    made["outcome"] = [_outcomes(outcomes) for _, outcomes in groups["outcome"]]
    made[measures] = groups[measures].mean()
    reached = groups["iterations_to_tolerance"].count() == made["runs"]
    made["iterations_to_tolerance"] = made["iterations_to_tolerance"].where(reached)
    made["half"] = np.nan
    told = {key: {"change": one.mean, "half": one.half} for key, one in changes.items()}
    made.update(pd.DataFrame.from_dict(told, orient="index"))
    return made.reset_index()


def _outcomes(outcomes: pd.Series) -> str | None:
    counts = Counter(outcomes.dropna()).most_common()
    if len(counts) == 1:
        return str(counts[0][0])
    return ", ".join(f"{count} {outcome}" for outcome, count in counts) or None


def paired(
    estimates: pd.DataFrame, groups: pd.Series, *, by_prompt: bool = False
) -> dict[Any, Interval]:
    """The change of the loss (nats/token) against the plain model, token by token, of each group.

    Tokens of one text are averaged first, as a run's own nll is, and those of several runs (other
    seeds, repeats) before that. Whole texts are resampled, or the tokens within each text where
    there are fewer than 8. A text that diverged does not count; without a change, no interval.
    Over 8 texts an interval holds the truth nine times in ten, over 32 nearly as often as it says.

    Args:
        estimates: as `Runs.estimates` has them; the last step counts.
        groups: by run, the group that it is a repeat of; a run that is not in it does not count.
        by_prompt: an interval for each (group, prompt_id), not for each group.
    """
    known = last_step(estimates[estimates["run"].isin(groups.index)]).dropna(subset=["plain"])
    # where a text diverged, tokens that the feedback did not reach yet are no sample of it
    finite = known["change"].astype(float).abs() < np.inf
    whole = finite.groupby([known["run"], known["prompt_id"]], observed=True).transform("all")
    known = known[whole]
    keys = [known["run"].map(groups), known["prompt_id"], known["position"]]
    worse = (0.0 - known["change"].astype(float)).groupby(keys, observed=True).mean()
    found: dict[Any, list[np.ndarray]] = {}
    key: Any
    for key, text in worse.groupby(level=[0, 1], observed=True):
        found.setdefault(key if by_prompt else key[0], []).append(text.to_numpy())
    made: dict[Any, Interval] = {}
    alike: dict[tuple[int, ...], list[Any]] = {}  # of the same lengths: they share what is drawn
    for key, texts in found.items():
        alike.setdefault(tuple(map(len, texts)), []).append(key)
    for lengths, same in alike.items():
        rng, members = np.random.default_rng(0), [found[key] for key in same]
        means = np.array([[text.mean() for text in texts] for texts in members])
        if len(lengths) >= LEAST_TEXTS:
            over, drawn = f"{len(lengths)} texts", _resampled(means, rng)
        else:
            over = f"{sum(lengths)} tokens of {len(lengths)} text{'s' if len(lengths) > 1 else ''}"
            each = [_resampled(np.array(text), rng) for text in zip(*members, strict=True)]
            drawn = np.mean(each, axis=0)
        ends = np.percentile(drawn, [2.5, 97.5], axis=1)
        for key, mean, low, high in zip(same, means.mean(axis=1), *ends, strict=True):
            made[key] = Interval(float(mean), float(low), float(high), over)
    return made


def _resampled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(groups, RESAMPLES) means of as many of (groups, n) values drawn with replacement."""
    count = values.shape[1]
    parts = np.array_split(range(RESAMPLES), 1 + RESAMPLES * count // 2**20)  # texts are long
    drawn = (rng.integers(count, size=(len(part), count)) for part in parts)
    means = [[one[places].mean(axis=1) for one in values] for places in drawn]
    return np.concatenate(means, axis=1)
