"""The finding of a study in a sentence or two, and no more than its intervals allow."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.intervals import Interval
from analysis.labels import favoured, fed, strength_text


def finding(
    runs: pd.DataFrame,
    rows: pd.DataFrame,
    changes: Mapping[int, Interval],
    *,
    longest: int,
    left_out: int,
) -> str:
    """From a row a run (as `Runs.runs`), a row a setting, and the change of the loss by setting.

    `longest` is the number of tokens of the longest text.
    """
    said = [_rest(runs, longest), _effect(rows, changes) + favoured(runs)]
    if left_out:
        noun = "run is" if left_out == 1 else "runs are"
        said.append(f"{left_out} {noun} failed or unfinished and not shown.")
    return " ".join(filter(None, said))


def _rest(runs: pd.DataFrame, longest: int) -> str:
    runs = runs[fed(runs)]
    if runs.empty:
        return "Nothing was fed back: this is the plain model."
    if runs["outcome"].isna().all():  # only some prompts were chosen
        return ""
    needed = runs["iterations_to_tolerance"].astype(float)
    # out of passes, and yet as near to the end as was asked for
    resting = runs[runs["outcome"].isin(["settled", "within_tolerance"]) | needed.notna()]
    if resting.empty:
        return "Fed back, the model's estimates did not come to rest in the passes given."
    share = f"{'all' if len(resting) == len(runs) else f'{len(resting)} of'} {len(runs)} runs"
    sentence = "Fed back, the model's estimates came to rest"
    sentence += f" in {share}" if len(runs) > 1 else ""
    if needed[resting.index].notna().all():
        most = needed.max()
        sentence += f", as good as final in at most {most:.0f} {'pass' if most == 1 else 'passes'}"
        if longest - 1 > most and resting["ends_by_theorem"].all():
            sentence += f" ({longest - 1} are guaranteed)"
    return f"{sentence}."


def _effect(rows: pd.DataFrame, changes: Mapping[int, Interval]) -> str:
    """How much worse or better tokens are predicted, each paired with the plain model."""
    if not changes:
        return ""
    noun = "settings" if (rows["runs"] > 1).any() else "runs"
    clear = {row: one for row, one in changes.items() if one.low > 0 or one.high < 0}
    unknown = int(fed(rows).sum()) - len(changes)
    rest = f"; the interval of {unknown} more is not known." if unknown else "."
    if not clear and len(changes) > 1:
        none = f"In none of {len(changes)} {noun} with feedback"
        return f"{none} does the model clearly predict worse or better{rest}"
    if not clear:
        (by,) = (_by(change, sign="+") for change in changes.values())
        return f"The model predicts neither clearly worse nor better: by {by}{rest}"
    parts = []
    for word, sign in (("worse", 1), ("better", -1)):
        group = [row for row, one in clear.items() if one.mean * sign > 0]
        if group:
            row = max(group, key=lambda one: abs(clear[one].mean))
            where = f" in {len(group)} of {len(changes)} {noun}" if len(changes) > 1 else ""
            most = "up to " if len(group) > 1 else ""
            of: Any = rows.loc[row]
            names = filter(None, (strength_text(of["kind"], of["strength"]), of["variant"]))
            parts.append(f"{word}{where}, by {most}{_by(clear[row])} ({', '.join(names)})")
    if len(changes) > len(clear):
        parts.append(f"neither clearly in {len(changes) - len(clear)}")
    return f"With feedback the model predicts {', '.join(parts)}{rest}"


def _by(change: Interval, sign: str = "") -> str:
    digits = 2 + sum(change.half < least for least in (0.1, 0.01))
    mean = change.mean if sign else abs(change.mean)
    text = f"{mean:{sign}.{digits}f} ± {change.half:.{digits}f} nats a token"
    return text.replace("-", "−")
