"""A study as one HTML file that needs no network, and in which nothing from a run can be executed.

What a run holds enters as JSON in a block of type application/json and leaves it through
`textContent` only; a Content-Security-Policy lets no script and no style in but those of this
folder. The page's own code is `page.css` and `script/*.js`, with uPlot (`vendor/`) for the curves.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from analysis.intervals import Interval, paired
from analysis.page.finding import finding
from analysis.page.texts import Text, packed, texts_of, thinned
from analysis.runs import Runs, unfinished

HERE = Path(__file__).parent
SCRIPTS = ("data", "words", "colours", "view", "tokens", "curve", "table", "controls", "main")
STUDY_LIMIT = 1_000_000  # bytes
RUN_LIMIT = 300_000  # bytes: a page beside each run in a tracker
# what every study may vary, by its place in the selects; any other setting follows
FAMILIAR = ("model", "kind", "layers", "start", "seed")
IMPLIED_BY_MODEL = ("model.path", "model.tokenizer")
COLUMNS = (
    ("outcome", "outcome", "How the passes ended"),
    ("iterations_to_tolerance", "passes", "Passes until every estimate is as good as final"),
    ("rate", "rate", "Factor by which a pass shrinks the distance to the end"),
    ("lyapunov", "λ", "Lyapunov exponent: above 0, small changes grow along the text"),
    ("nll", "surprise", "Mean surprise of a token once all is at rest, in nats"),
    ("change", "Δ surprise", "The same less the plain model's, in nats; above 0 is worse"),
    ("kl_effect", "effect", "How different the predictions became: KL divergence, in nats"),
)
TOLERANCE = 1e-3  # nats, where a run did not record its own


def build(saved: Runs, *, limit: int = STUDY_LIMIT) -> str:
    """The page of these runs, of at most `limit` bytes if thinning can get there."""
    texts = _texts(saved)
    content = _content(saved, texts)
    whole = [len(texts), len({text.prompt for text in texts})]
    for kept, given_up in thinned(texts):
        page = _html({**content, **_stored(kept, saved.runs), "thinned": given_up, "whole": whole})
        if len(page.encode("utf-8")) <= limit:
            break
    return page


def page_of_run(folder: Path) -> str:
    """The page of one run, small enough to lie beside it in a tracker; it may be unfinished."""
    return build(unfinished(folder), limit=RUN_LIMIT)


def _texts(saved: Runs) -> list[Text]:
    if saved.trajectory.empty:
        return []
    runs = saved.runs
    tolerance = _numbers(runs, "reporting_tolerance").fillna(TOLERANCE)
    start = runs["start"] if "start" in runs else pd.Series("cold", index=runs.index)
    still = saved.prompts[saved.prompts["outcome"] == "settled"]
    texts = texts_of(
        saved.trajectory,
        tolerance=dict(zip(map(int, runs.index), tolerance, strict=True)),
        still={(int(run), str(p)) for run, p in zip(still["run"], still["prompt_id"], strict=True)},
        cold={int(run) for run in runs.index[start != "carried"]},
    )
    places = {prompt: place for place, prompt in enumerate(saved.prompt_ids)}
    return sorted(texts, key=lambda text: (text.run, places[text.prompt], text.step))


def _changes(saved: Runs) -> dict[int, Interval]:
    """By run: what feedback did to the loss of a token, where that can be said."""
    fed = saved.runs.index[saved.runs["strength"].notna() & (saved.runs["strength"] != 0)]
    if saved.trajectory.empty:
        return {}
    groups = saved.estimates.groupby("run")
    changes = {int(run): paired(groups.get_group(run)) for run in fed if run in groups.groups}
    return {run: change for run, change in changes.items() if change is not None}


def _content(saved: Runs, texts: Sequence[Text]) -> dict[str, object]:
    change = _numbers(saved.runs, "nll") - _numbers(saved.runs, "nll_plain")
    runs = saved.runs.assign(change=change)
    left_out = (*saved.left_out, *saved.damaged)
    longest = max((len(text.tokens) for text in texts), default=0)
    differing = _differing(runs, saved.settings)
    keys = [key for key, *_ in COLUMNS]
    rows = [
        {
            "id": str(row["run_id"]),
            "study": str(row["study"]),
            "strength": _plain(row["strength"]),
            "settings": [_said(row[name]) for name in differing],
            "measures": [_plain(row.get(key)) for key in keys],
        }
        for _, row in runs.iterrows()
    ]
    return {
        "title": ", ".join(dict.fromkeys(runs["study"].astype(str))),
        "finding": finding(runs, _changes(saved), longest=longest, left_out=len(left_out)),
        "settings": differing,
        "kind": _said(runs["kind"].iloc[0]),
        "columns": [{"key": key, "name": name, "about": about} for key, name, about in COLUMNS],
        "runs": rows,
        "leftOut": [{"id": one.run_id, "reason": one.reason} for one in left_out],
        "provenance": _provenance([saved.saved[int(run)].status for run in runs.index]),
    }


def _stored(texts: Sequence[Text], runs: pd.DataFrame) -> dict[str, object]:
    """The texts as rows of numbers, each list of tokens and of passes kept once."""
    places = {run: place for place, run in enumerate(runs.index)}
    models = runs.reindex(columns=["model", "model.path"]).astype(str).agg(tuple, axis=1)
    names = [(models[text.run], text.prompt, text.step, text.first, text.tokens) for text in texts]
    plain = {name: place for place, name in reversed([*enumerate(names)]) if texts[place].plain}
    prompts = list(dict.fromkeys(text.prompt for text in texts))
    longest: dict[tuple[str, ...], None] = {}
    for text in sorted(texts, key=lambda text: -len(text.tokens)):
        if _beginning(text.tokens, longest) is None:
            longest[text.tokens] = None
    tokens = list(longest)
    passes = list(dict.fromkeys(tuple(map(int, text.passes)) for text in texts))
    return {
        "prompts": prompts,
        "tokens": tokens,
        "passes": passes,
        "texts": [
            [
                places[text.run],
                prompts.index(text.prompt),
                text.step,
                text.first,
                len(text.tokens),
                _beginning(text.tokens, longest),
                passes.index(tuple(map(int, text.passes))),
                place if text.plain else plain.get(names[place]),
            ]
            for place, text in enumerate(texts)
        ],
        "values": packed(texts),
    }


def _beginning(tokens: tuple[str, ...], longest: Mapping[tuple[str, ...], None]) -> int | None:
    """The number of the first list that begins with these tokens."""
    for number, known in enumerate(longest):
        if known[: len(tokens)] == tokens:
            return number
    return None


def _differing(runs: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    """The settings, strength apart, in which the runs differ; the familiar ones first."""
    names = [name for name in ("study", *settings) if name != "strength" and name in runs]
    differing = [name for name in names if runs[name].map(_said).nunique() > 1]
    if "model" in differing:  # these only repeat it, unless they say more
        per_model = runs.astype({name: str for name in differing}).groupby("model")
        differing = [
            name
            for name in differing
            if name not in IMPLIED_BY_MODEL or per_model[name].nunique().max() > 1
        ]
    return sorted(differing, key=lambda name: (*FAMILIAR, name).index(name))


def _provenance(recorded: Sequence[Mapping[str, object]]) -> list[list[object]]:
    """What was recorded of how the runs were made: a name, and its different values."""
    found: list[list[object]] = []
    for name in ("commit", "device", "command", "started", "finished"):
        values = sorted({str(one[name]) for one in recorded if one.get(name) is not None})
        if name in ("started", "finished"):  # of the first, of the last
            values = values[:1] if name == "started" else values[-1:]
        if values:
            found.append([name, values])
    dirty = sum(one.get("dirty") is True for one in recorded)
    if dirty:
        found.append(["changes", [f"{dirty} of {len(recorded)} with changes that no commit holds"]])
    return found


def _numbers(runs: pd.DataFrame, name: str) -> pd.Series:
    empty = pd.Series(math.nan, index=runs.index)
    return pd.to_numeric(runs.get(name, empty), errors="coerce").astype(float)


def _said(value: object) -> str:
    plain = _plain(value)
    return "" if plain is None else f"{plain:g}" if isinstance(plain, float) else str(plain)


def _plain(value: object) -> object:
    """As JSON can hold it: nothing for what is missing, words for what is no finite number."""
    if value is None or value is pd.NaT or value is pd.NA:
        return None
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if isinstance(value, str | int | float | bool) else str(value)


def _html(content: Mapping[str, object]) -> str:
    """`template.html` with everything in its place; only in the data is `<` escaped."""
    scripts = [_read("vendor/uPlot.iife.min.js"), _script()]
    styles = [_read("vendor/uPlot.min.css"), _read("page.css")]
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; "
        "base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    parts = {
        "policy": policy,
        "styles": "\n".join(f"<style>{style}</style>" for style in styles),
        "data": data.replace("<", "\\u003c"),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    page = _read("template.html")
    pieces = [page]
    for name, part in parts.items():  # each mark once, and never inside what was put in
        before, _, after = pieces.pop().partition(f"<!-- {name} -->")
        pieces += [before, part, after]
    return "".join(pieces)


def _script() -> str:
    """The files of `script/` in order, as one script that leaves nothing behind."""
    files = "\n".join(_read(f"script/{name}.js") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{files}}})();\n'


def _hashes(contents: Sequence[str]) -> str:
    digests = (hashlib.sha256(content.encode("utf-8")).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
