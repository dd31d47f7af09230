"""What a run is called beside others: exactly the settings in which they differ, and no more.

The one place where runs, trained models and contestants get their names, are put in order, and are
found to be repeats of one another.
"""

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import PurePath
from typing import Any

import pandas as pd

from analysis.text import number, printable

# settings by key or by its last part; a mapping spells the values that do not speak for themselves
WORDS: Mapping[str, str | Mapping[object, str]] = {
    "kind": {"none": ""},  # "no feedback" says it already
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
FILE = "prompts.file"  # named without folder and suffix where that tells them apart
# of files that may have been others when another run read them, under one name
CONTENTS = ("texts", "weights", "sources")
SEEDS = ("seed", "generation.seed")
# settings that only repeat what another has said, unless they say more
IMPLIED_BY = {
    "model.library": "model",
    "model.path": "model",
    "model.tokenizer": "model",
    "prompts.file": "prompts.source",
    "generation.seed": "seed",
    "recompute.window": "solver",
}


def with_labels(frame: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """The rows in order, with the columns label, variant and group; the index counts them.

    Runs of one `variant` differ in strength and seed at most, those of one `group` (a number) in
    their seed at most: they are repeats of one setting. No two rows share a `label`. `settings` are
    the columns that can change a result; run_id is unique within a study. Columns of CONTENTS, if
    there are any, say what a run read from its files: where that of one variant's runs differs, its
    number within the frame tells them apart, and is returned; missing, it is taken for the least.
    """
    strength = [name for name in settings if name == "strength"]  # models have none
    seeds = [name for name in settings if name in SEEDS]
    named = [name for name in differing(frame, settings) if name not in (*strength, *seeds)]
    order = dict.fromkeys(["study", "kind", *named, *strength, *seeds, "run_id"])
    made = frame.sort_values(
        [name for name in order if name in frame], key=_ranks, ignore_index=True
    )
    spoken = made.assign(**{name: _stems(made[name]) for name in named if name == FILE})
    words = [[spelt(name, row[name]) for name in named] for row in spoken.to_dict("records")]
    made["variant"] = [", ".join(filter(None, one)) for one in words]
    for noun in made.columns.intersection([*CONTENTS]):
        place = {one: number for number, one in enumerate(made[noun].dropna().unique(), start=1)}
        for variant, read in made.pop(noun).map(place).groupby(made["variant"]):
            if read.nunique() > 1:
                numbers = [f"{one:g}" for one in read.fillna(read.min())]
                names = [", ".join(filter(None, (variant, f"{noun} {n}"))) for n in numbers]
                made.loc[read.index, noun], made.loc[read.index, "variant"] = numbers, names
    labels = made["variant"]
    if strength:
        pairs = zip(map(strength_text, made["kind"], made["strength"]), labels, strict=True)
        labels = pd.Series([", ".join(filter(None, pair)) for pair in pairs])
        made["variant"] = made["variant"].mask(made["kind"] == "none", labels)  # one of its own
    made["group"] = pd.factorize(labels)[0]
    labels = labels.where(labels != "", "run" if strength else made["run_id"])
    for name in differing(made, seeds):
        labels = labels + [f", {name.replace('.', ' ')} {value}" for value in made[name]]
    repeats = zip(labels.groupby(labels).cumcount(), made["run_id"], strict=True)
    labels = labels + [f", repeat {n + 1} ({name})" if n else "" for n, name in repeats]
    return made.assign(label=labels.map(printable), variant=made["variant"].map(printable))


def differing(frame: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    """The settings that rows recorded with different values, but for those that another implies.

    A null is a value, as of a top_k that is not set; NaN is none: the setting was not recorded.
    """

    def count(values: pd.Series) -> int:
        return len({_natural(value) for value in values if value is None or not pd.isna(value)})

    def implied(name: str) -> bool:
        by = IMPLIED_BY.get(name)
        if by not in frame:
            return False
        counts = frame.groupby(frame[by].astype(str))[name].agg(count)
        return len(counts) > 1 and counts.max() <= 1

    return [name for name in settings if count(frame[name]) > 1 and not implied(name)]


def spelt(name: str, value: Any) -> str:
    """A setting in words, `16 iterations`, `start carried`; nothing for one that is missing."""
    if pd.isna(value):
        return ""
    word = WORDS.get(name) or WORDS.get(name.rpartition(".")[2]) or f"{name} {{}}"
    if isinstance(word, Mapping):
        return word.get(value, str(value))
    real = isinstance(value, Real) and not isinstance(value, bool)
    text = word.replace("{}", number(float(value)) if real else str(value))
    if text == "1× steps":
        return ""
    return re.sub(r"(?<=ss)es$|s$", "", text) if text.startswith("1 ") else text


def fed(runs: pd.DataFrame) -> pd.Series:
    """Which runs feed anything back."""
    recorded = runs.reindex(columns=["strength", "hidden_strength"])
    strengths: pd.DataFrame = recorded.apply(pd.to_numeric, errors="coerce")
    return strengths.fillna(0.0).ne(0.0).any(axis=1)


def favoured(runs: pd.DataFrame) -> str:
    """What to bear in mind of the losses of texts that grew, if any did."""
    grew = any(isinstance(n, int) and n > 0 for n in runs[fed(runs)].get("max_new_tokens", ()))
    return " A text that grew was written with the feedback, which favours it." if grew else ""


def strength_text(kind: str, strength: float) -> str:
    """`β = 0.5`; a hidden state has a scale s instead; without feedback there is no strength."""
    if pd.isna(strength):
        return "no feedback" if kind == "none" else ""
    return f"{'s' if kind == 'hidden_state' else 'β'} = {number(strength)}"


def _stems(paths: pd.Series) -> pd.Series:
    short = {path: PurePath(str(path)).stem for path in paths.dropna().unique()}
    return paths.replace(short) if len(set(short.values())) == len(short) else paths


def _ranks(column: pd.Series) -> pd.Series:
    """Ranks by which numbers sort as numbers, also within text, and what is missing comes first."""
    ranks = {key: rank for rank, key in enumerate(sorted(set(map(_natural, column))))}
    return column.map(lambda value: ranks[_natural(value)])


def _natural(value: Any) -> tuple[tuple[int, float, str], ...]:
    """A key that is the same for 1 and 1.0, and another for m1 and m01."""
    if pd.isna(value):
        return ()
    if isinstance(value, Real):
        return ((0, float(value), ""),)
    parts = re.split(r"(\d+)", str(value))
    return tuple((0, float(p), p) if p.isdecimal() else (1, 0.0, p) for p in parts if p)
