"""The finding of a study in a sentence or two, and no more than its intervals allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.page.texts import Text

AT_REST = ("settled", "within_tolerance")
QUANTILE = 1.96  # of a normal distribution, for an interval of 95 %


@dataclass(frozen=True)
class Change:
    """What feedback did to the surprise of a token: a mean with half its 95 % interval, in nats."""

    mean: float
    half: float

    @property
    def clear(self) -> bool:
        return abs(self.mean) > self.half

    @property
    def signed(self) -> str:
        return f"{self.mean:+.2f} ± {self.half:.2f} nats a token".replace("-", "−")

    def __str__(self) -> str:
        return f"{abs(self.mean):.2f} ± {self.half:.2f} nats a token"


def finding(runs: pd.DataFrame, texts: Sequence[Text], *, left_out: int) -> str:
    """From a row a run (index run; kind, strength, outcome ...) and its texts."""
    said = [_rest(runs, texts), _effect(runs, texts)]
    if left_out:
        noun = "run is" if left_out == 1 else "runs are"
        said.append(f"{left_out} {noun} failed or unfinished and not shown.")
    return " ".join(filter(None, said))


def _rest(runs: pd.DataFrame, texts: Sequence[Text]) -> str:
    # out of passes, and yet as near to the end as was asked for
    near = pd.to_numeric(runs["iterations_to_tolerance"], errors="coerce").notna()
    resting = runs[runs["outcome"].isin(AT_REST) | near]
    all_rest = len(resting) == len(runs)
    if len(runs) == 1:
        sentence = "Fed back, the model's estimates came to rest"
        if not all_rest:
            return "Fed back, the model's estimates did not come to rest in the passes given."
    else:
        share = f"all {len(runs)}" if all_rest else f"{len(resting)} of {len(runs)}"
        sentence = f"Fed back, the model's estimates came to rest in {share} runs"
    needed = pd.to_numeric(resting["iterations_to_tolerance"], errors="coerce").dropna()
    if len(needed):
        most = int(needed.max())
        limit = "at most " if len(needed) > 1 else ""
        sentence += f", after {limit}{most} {'pass' if most == 1 else 'passes'}"
        bound = max((len(text.tokens) - 1 for text in texts), default=0)
        if bound > most and all(_bounded(row) for _, row in resting.iterrows()):
            sentence += f" ({bound} are guaranteed)"
    return f"{sentence}."


def _bounded(row: pd.Series) -> bool:
    """Whether T − 1 passes must do: an estimate depends on earlier ones alone, and is undamped."""
    damping = row.get("damping")
    same_position = row.get("kind") == "hidden_state" and row.get("shift") == 0
    return not same_position and (pd.isna(damping) or float(damping) == 1.0)


def _effect(runs: pd.DataFrame, texts: Sequence[Text]) -> str:
    """How much worse or better tokens are predicted, each paired with the plain model."""
    changes: list[tuple[Change, pd.Series]] = []
    for run, row in runs.iterrows():
        fed = pd.notna(row["strength"]) and row["strength"] != 0
        change = change_of([text for text in texts if text.run == run]) if fed else None
        if change is not None:
            changes.append((change, row))
    if not changes:
        return ""
    worse = [one for one in changes if one[0].clear and one[0].mean > 0]
    better = [one for one in changes if one[0].clear and one[0].mean < 0]
    unclear = len(changes) - len(worse) - len(better)
    if len(changes) == 1:
        change = changes[0][0]
        if unclear:
            return f"It predicts neither clearly worse nor better: by {change.signed}."
        return f"It predicts {'worse' if worse else 'better'}, by {change}."
    if unclear == len(changes):
        return f"In none of {unclear} runs with feedback does it clearly predict worse or better."
    several = runs["kind"].nunique() > 1
    parts = [
        f"{word} in {len(group)} of {len(changes)} runs, by up to {_largest(group, several)}"
        for word, group in (("worse", worse), ("better", better))
        if group
    ]
    if unclear:
        parts.append(f"neither clearly in {unclear}")
    return f"With feedback it predicts {', '.join(parts)}."


def _largest(group: Sequence[tuple[Change, pd.Series]], several_kinds: bool) -> str:
    change, row = max(group, key=lambda one: abs(one[0].mean))
    symbol = "s" if row["kind"] == "hidden_state" else "β"
    kind = f"{row['kind']}, " if several_kinds else ""
    return f"{change} ({kind}{symbol} = {row['strength']:g})".replace("-", "−")


def change_of(texts: Sequence[Text]) -> Change | None:
    """The change from the plain model, over the tokens of the last steps of one run's texts.

    Tokens count as independent. None where the first pass need not be the plain model's, where
    some estimate is no number, or where there are too few tokens to say.
    """
    last = {text.prompt: text for text in texts}
    changes = [-text.gain[1:] for text in last.values()]  # nothing predicts the first token
    together = np.concatenate(changes) if changes else np.zeros(0)
    plain = all(text.plain for text in last.values())
    if not plain or len(together) < 2 or not np.isfinite(together).all():
        return None
    half = QUANTILE * together.std(ddof=1) / math.sqrt(len(together))
    return Change(mean=float(together.mean()), half=float(half))
