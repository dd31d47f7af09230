"""What a run is called beside others: exactly the settings in which the runs differ.

No two runs share a label. Knows the names of settings, nothing of how a line is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis.runs import Runs

# settings that only repeat what the model's name has said, unless they say more
IMPLIED_BY_MODEL = ("model.path", "model.tokenizer")
WORDS = {
    "layers": "layers",
    "iterations": "iterations",
    "model": "model",
    "start": "start",
    "max_new_tokens": "new tokens",
    "top_k": "top-k",
    "generation.seed": "sampling seed",
    "prompts.file": "prompts",
    "prompts.limit": "prompt limit",
    "prompts.max_tokens": "prompt tokens ≤",
}


@dataclass(frozen=True)
class Series:
    """One run as a line: `label` is unique, `variant` is the label without the strength."""

    run: int
    run_id: str
    kind: str
    strength: float | None  # None: no feedback, so no strength
    label: str
    variant: str
    ends_by_theorem: bool  # T - 1 iterations settle it


def number(value: float) -> str:
    """Shortest plain spelling, with a true minus sign."""
    text = f"{value:.4g}"
    return text.replace("-", "\u2212")


def strength_text(kind: str, strength: float | None) -> str:
    """`β = 0.5`; a hidden state has a scale s instead; without feedback there is no strength."""
    if strength is None:
        return "no feedback"
    return f"{'s' if kind == 'hidden_state' else 'β'} = {number(strength)}"


def series_of(runs: Runs) -> tuple[Series, ...]:
    """One Series per run, ordered by variant and strength."""
    frame = runs.runs
    differing = _differing(runs)
    found: list[Series] = []
    taken: dict[tuple[str, float | None], int] = {}
    for run, row in frame.iterrows():
        strength = None if pd.isna(row["strength"]) else float(row["strength"])
        plain = row["kind"] == "none"
        named = [name for name in differing if _said(row[name]) and not (plain and name == "kind")]
        variant = ", ".join(_setting(name, row[name]) for name in named)
        label = ", ".join(filter(None, (strength_text(row["kind"], strength), variant)))
        if plain:  # it has no strength, so it is a variant of its own
            variant = label
        before = taken.setdefault((variant, strength), 0)
        taken[variant, strength] += 1
        if before:  # same recorded settings: tell them apart by what is left
            repeat = f"repeat {before + 1} ({row['run_id']})"
            variant, label = ", ".join(filter(None, (variant, repeat))), f"{label}, {repeat}"
        found.append(
            Series(
                run=int(run),  # type: ignore[call-overload]
                run_id=str(row["run_id"]),
                kind=str(row["kind"]),
                strength=strength,
                label=label,
                variant=variant,
                ends_by_theorem=_ends_by_theorem(row),
            )
        )
    return tuple(sorted(found, key=_order))


def variants_of(series: tuple[Series, ...]) -> dict[str, tuple[Series, ...]]:
    """Series that differ in strength alone, by what they share."""
    groups: dict[str, list[Series]] = {}
    for one in series:
        groups.setdefault(one.variant, []).append(one)
    return {name: tuple(group) for name, group in groups.items()}


def _differing(runs: Runs) -> list[str]:
    """The settings, strength apart, that at least two runs recorded with different values."""
    frame = runs.runs
    names = [name for name in ("study", *runs.settings) if name != "strength"]
    differing = [name for name in names if _values(frame[name]) > 1]
    if "model" not in differing:
        return differing
    per_model = frame.groupby("model", dropna=False)
    implied = {name for name in IMPLIED_BY_MODEL if name in differing}
    implied = {name for name in implied if per_model[name].nunique().max() <= 1}
    return [name for name in differing if name not in implied]


def _values(column: pd.Series) -> int:
    # 1 and 1.0 are one setting
    said = [value for value in column if _said(value)]
    return len({float(v) if isinstance(v, int | float) else str(v) for v in said})


def _said(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and value != value)


def _setting(name: str, value: object) -> str:
    if name == "kind":
        return str(value)
    shown = number(value) if isinstance(value, float) else str(value)
    if name == "iterations":
        return f"{shown} iterations"
    return f"{WORDS.get(name, name)} {shown}"


def _ends_by_theorem(row: pd.Series) -> bool:
    """Strictly triangular and undamped: method.md, section 2."""
    same_position = row["kind"] == "hidden_state" and row.get("shift") == 0
    damping = row.get("damping")
    return not same_position and (not _said(damping) or float(damping) == 1.0)


def _order(one: Series) -> tuple[str, float, str]:
    return one.variant, float("-inf") if one.strength is None else one.strength, one.run_id
