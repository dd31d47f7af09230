"""Runs of one setting as one row: the mean of each measure, and what became of how many.

The one place where repeats are put together, for the table and the page alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

MEANS = ["tokens", "iterations_to_tolerance", "rate", "lyapunov", "nll", "nll_plain", "kl_effect"]


def pooled(rows: pd.DataFrame, by: Sequence[str], *, first: Sequence[str] = ()) -> pd.DataFrame:
    """A row for each of `by`, in the order in which they appear.

    Of the first row of each: the columns `first`. Over all of them: runs (how many), outcome
    (`settled`, or `2 settled, 1 cycle`), the MEANS there are, and change: nll less the plain
    model's (nats). Passes to tolerance are missing unless every run got there.
    """
    measures = [name for name in MEANS if name in rows]
    groups = rows.groupby(list(by), sort=False)
    made = groups[[*first]].first(skipna=False)
    made["runs"] = groups.size()
    made["outcome"] = [_outcomes(outcomes) for _, outcomes in groups["outcome"]]
    made[measures] = groups[measures].mean()
    reached = groups["iterations_to_tolerance"].count() == made["runs"]
    made["iterations_to_tolerance"] = made["iterations_to_tolerance"].where(reached)
    made["change"] = made["nll"] - made["nll_plain"]
    return made.reset_index()


def _outcomes(outcomes: pd.Series) -> str | None:
    counts = Counter(one for one in outcomes if isinstance(one, str)).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{count} {outcome}" for outcome, count in counts) or None
