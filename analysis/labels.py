"""What a run is called beside others: exactly the settings in which they differ, and no more.

The one place where runs, trained models and contestants get their names, are put in order, and are
found to be repeats of one another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real

import pandas as pd

from analysis.text import number, printable

# settings by key or by its last part; a mapping spells the values that are no numbers
WORDS: Mapping[str, str | Mapping[object, str]] = {
    "kind": "{}",
    "iterations_allowed": "{} iterations",
    "max_new_tokens": "new tokens {}",
    "top_k": "top-k {}",
    "file": "prompts {}",
    "limit": "prompt limit {}",
    "max_tokens": "prompt tokens ≤ {}",
    "n_layer": "{} layers",
    "contestant.layers": "{} layers",
    "n_embd": "width {}",
    "hidden_feedback": {True: "stateful", False: "plain"},
    "stateful": {True: "stateful", False: "plain"},
    "passes": "{} passes",
    "draw_passes": {True: "drawn at random", False: ""},
    "drawn": {True: "drawn at random", False: ""},
    "through_passes": {True: "back-propagated", False: "detached"},
    "through": {True: "back-propagated", False: "detached"},
    "update_every_pass": {True: "a step a pass", False: ""},
    "steps": "{} steps",
    "times": "{}× steps",
}
SEEDS = ("seed", "generation.seed")
# settings that only repeat what the model's name has said, unless they say more
IMPLIED_BY_MODEL = ("model.path", "model.tokenizer")


def with_labels(
    frame: pd.DataFrame, settings: Sequence[str], *, strength: str | None = None
) -> pd.DataFrame:
    """The rows in order, with the columns label, variant and group; the index counts them.

    Runs of one `variant` differ in strength and seed at most, those of one `group` (a number) in
    their seed at most: they are repeats of one setting. No two rows share a `label`.

    Args:
        frame: a row a run, with a unique run_id within a study.
        settings: its columns that can change a result.
        strength: the one of them that `variant` leaves out.
    """
    seeds = [name for name in settings if name in SEEDS]
    named = [
        name
        for name in differing(frame, settings)
        if name != strength and name not in seeds and not _implied(frame, name)
    ]
    made = frame.copy()
    made["variant"] = [
        ", ".join(filter(None, (spelt(name, row[name]) for name in named if said(row[name]))))
        for _, row in frame[named].iterrows()
    ]
    order = [_order(row, named, strength, seeds) for _, row in made.iterrows()]
    made = made.iloc[sorted(range(len(made)), key=order.__getitem__)].reset_index(drop=True)
    labels = made["variant"]
    if strength is not None:
        strengths = [
            strength_text(kind, value)
            for kind, value in zip(made["kind"], made[strength], strict=True)
        ]
        plain = made["kind"] == "none"
        if "kind" in named:  # "no feedback" says it already
            labels = labels.mask(plain, labels.str.replace(r"^none(, )?", "", regex=True))
        labels = pd.Series(
            [", ".join(filter(None, both)) for both in zip(strengths, labels, strict=True)],
            index=made.index,
        )
        made["variant"] = made["variant"].mask(plain, labels)  # without strength: one of its own
    labels = labels.where(labels != "", made["run_id"] if strength is None else "run")
    made["group"] = labels.groupby(labels, sort=False).ngroup()
    for name in differing(made, seeds):
        labels = labels + [f", {name.replace('.', ' ')} {value}" for value in made[name]]
    repeats = zip(labels.groupby(labels).cumcount(), made["run_id"], strict=True)
    labels = labels + [f", repeat {n + 1} ({name})" if n else "" for n, name in repeats]
    made["label"] = labels.map(printable)
    made["variant"] = made["variant"].map(printable)
    return made


def differing(frame: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    """The settings that at least two rows recorded with different values."""
    return [name for name in settings if len({_same(v) for v in frame[name] if said(v)}) > 1]


def said(value: object) -> bool:
    return value is not None and value == value


def spelt(name: str, value: object) -> str:
    """A setting in words: `16 iterations`, `start carried`."""
    word = WORDS.get(name) or WORDS.get(name.rpartition(".")[2])
    if isinstance(word, Mapping):
        return word.get(value, f"{name} {value}")
    shown = (
        number(float(value))
        if isinstance(value, Real) and not isinstance(value, bool)
        else str(value)
    )
    if word is None:
        return f"{name} {shown}"
    text = word.format(shown).replace("1× steps", "") if shown == "1" else word.format(shown)
    return text.removesuffix("s") if text in ("1 layers", "1 steps", "1 iterations") else text


def strength_text(kind: str, strength: float) -> str:
    """`β = 0.5`; a hidden state has a scale s instead; without feedback there is no strength."""
    if strength != strength:
        return "no feedback" if kind == "none" else ""
    return f"{'s' if kind == 'hidden_state' else 'β'} = {number(strength)}"


def natural(value: object) -> tuple[tuple[int, float, str], ...]:
    """A key by which numbers sort as numbers, also within text."""
    if not said(value):
        return ()
    if isinstance(value, Real):
        return ((0, float(value), ""),)
    parts = re.split(r"(\d+)", str(value))
    return tuple((0, float(p), "") if p.isdigit() else (1, 0.0, p) for p in parts if p)


def _same(value: object) -> object:
    # 1 and 1.0 are one setting
    return float(value) if isinstance(value, Real) else str(value)


def _implied(frame: pd.DataFrame, name: str) -> bool:
    if name not in IMPLIED_BY_MODEL or "model" not in frame:
        return False
    per_model = frame.groupby(frame["model"].astype(str))[name]
    return frame["model"].nunique() > 1 and bool(per_model.nunique().max() <= 1)


def _order(
    row: pd.Series, named: Sequence[str], strength: str | None, seeds: Sequence[str]
) -> tuple[object, ...]:
    last = [*([strength] if strength else []), *seeds, "run_id"]
    return tuple(natural(row.get(name)) for name in ("study", "kind", *named, *last))
