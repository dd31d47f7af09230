"""The finding of a study in a sentence or two, and no more than its intervals allow."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from analysis.intervals import Interval

AT_REST = ("settled", "within_tolerance")


def finding(
    runs: pd.DataFrame, changes: Mapping[int, Interval], *, longest: int, left_out: int
) -> str:
    """From a row a run (index run, as `Runs.runs`), and the change of the loss where it is known.

    `longest` is the number of tokens of the longest text.
    """
    said = [_rest(runs, longest), _effect(runs, changes)]
    if left_out:
        noun = "run is" if left_out == 1 else "runs are"
        said.append(f"{left_out} {noun} failed or unfinished and not shown.")
    return " ".join(filter(None, said))


def _rest(runs: pd.DataFrame, longest: int) -> str:
    if runs["outcome"].isna().all():  # only some prompts were chosen
        return ""
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
        if longest - 1 > most and resting["ends_by_theorem"].all():
            sentence += f" ({longest - 1} are guaranteed)"
    return f"{sentence}."


def _effect(runs: pd.DataFrame, changes: Mapping[int, Interval]) -> str:
    """How much worse or better tokens are predicted, each paired with the plain model."""
    if not changes:
        return ""
    worse = {run: one for run, one in changes.items() if _clear(one) and one.mean > 0}
    better = {run: one for run, one in changes.items() if _clear(one) and one.mean < 0}
    unclear = len(changes) - len(worse) - len(better)
    if len(changes) == 1:
        (change,) = changes.values()
        if unclear:
            by = _nats(change, signed=True)
            return f"The model predicts neither clearly worse nor better: by {by}."
        return f"The model predicts {'worse' if worse else 'better'}, by {_nats(change)}."
    if unclear == len(changes):
        none = f"In none of {unclear} runs with feedback"
        return f"{none} does the model clearly predict worse or better."
    parts = [
        f"{word} in {len(group)} of {len(changes)} runs, by up to {_largest(group, runs)}"
        for word, group in (("worse", worse), ("better", better))
        if group
    ]
    if unclear:
        parts.append(f"neither clearly in {unclear}")
    return f"With feedback the model predicts {', '.join(parts)}."


def _largest(group: Mapping[int, Interval], runs: pd.DataFrame) -> str:
    run = max(group, key=lambda one: abs(group[one].mean))
    kind = str(runs["kind"].at[run])
    strength = f"{runs['strength'].astype(float).at[run]:g}"
    symbol = "s" if kind == "hidden_state" else "β"
    named = f"{kind}, " if runs["kind"].nunique() > 1 else ""
    return f"{_nats(group[run])} ({named}{symbol} = {strength})".replace("-", "−")


def _clear(change: Interval) -> bool:
    return change.low > 0 or change.high < 0


def _nats(change: Interval, *, signed: bool = False) -> str:
    mean = f"{change.mean:+.2f}" if signed else f"{abs(change.mean):.2f}"
    return f"{mean} ± {change.half:.2f} nats a token".replace("-", "−")
