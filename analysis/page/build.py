"""A study as one HTML file that needs no network, and in which nothing from a run can be executed.

What a run holds enters as JSON in a block of type application/json and leaves it through
`textContent` only; a Content-Security-Policy lets no script and no style in but those of this
folder. The page's own code is `page.css` and `script/*.js`, with uPlot (`vendor/`) for the curves.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.intervals import paired, pooled
from analysis.labels import SEEDS, differing, fed
from analysis.page.finding import finding
from analysis.page.texts import Text, packed, texts_of, thinned
from analysis.read.run_folder import read_run
from analysis.runs import Runs, frames_of
from analysis.text import short

HERE = Path(__file__).parent
SCRIPTS = ("data", "words", "colours", "view", "tokens", "curve", "table", "controls", "main")
STUDY_LIMIT = 1_000_000  # bytes
RUN_LIMIT = 300_000  # bytes: a page beside each run in a tracker
# what every study may vary, by its place in the selects; any other setting follows
FAMILIAR = ("model", "kind", "layers", "start", "seed")
COLUMNS = (
    ("outcome", "outcome", "How the passes ended"),
    ("iterations_to_tolerance", "passes", "Passes until every estimate is as good as final"),
    ("rate", "rate", "Factor by which a pass shrinks the distance to the end"),
    ("lyapunov", "λ", "Lyapunov exponent: above 0, small changes grow along the text"),
    ("nll", "surprise", "Mean surprise of a token after the last pass, in nats"),
    ("change", "Δ surprise", "The same less the plain model's, in nats; above 0 is worse"),
    ("half", "±", "Half the 95 % interval of that change, over texts, or tokens of fewer than 8"),
    ("kl_effect", "effect", "How different the predictions became: KL divergence, in nats"),
)
LONGEST = 2000  # characters of a recorded command, or of the studies' names
TOLERANCE = 1e-3  # nats, where a run did not record its own


def build(saved: Runs, *, limit: int = STUDY_LIMIT) -> str:
    """The page of these runs, of at most `limit` bytes unless its table alone has more."""
    texts = _texts(saved)
    content = _content(saved, texts)
    whole = [len(texts), len({text.prompt for text in texts})]
    for kept, given_up in thinned(texts):
        page = _html({**content, **_stored(kept, saved), "thinned": given_up, "whole": whole})
        if len(page.encode("utf-8")) <= limit:
            break
    return page


def page_of_run(folder: Path) -> str:
    """The page of one run, small enough to lie beside it in a tracker; it may be unfinished."""
    return build(frames_of([read_run(folder, finished=False)]), limit=RUN_LIMIT)


def _texts(saved: Runs) -> list[Text]:
    tolerance = pd.to_numeric(saved.setting("reporting_tolerance"), errors="coerce")
    still = saved.prompts[saved.prompts["outcome"] == "settled"]
    texts = texts_of(
        saved.trajectory,
        tolerance=tolerance.fillna(TOLERANCE).to_dict(),
        still=set(still[["run", "prompt_id"]].itertuples(index=False, name=None)),
        cold=set(saved.runs.index[(saved.setting("start") != "carried") | ~fed(saved.runs)]),
    )
    order = saved.prompt_ids
    return sorted(texts, key=lambda text: (text.run, order.index(text.prompt), text.step))


def _content(saved: Runs, texts: Sequence[Text]) -> dict[str, object]:
    runs = saved.runs
    told = [name for name in ("kind", "strength", "hidden_strength", "variant") if name in runs]
    changes = paired(saved.estimates, runs["group"])
    rows = pooled(runs, ["group"], first=told, changes=changes).set_index("group")
    rows["iterations_to_tolerance"] = rows["iterations_to_tolerance"].round(1)  # a mean
    left_out = (*saved.left_out, *saved.damaged)
    settings = [name for name in differing(runs, ("study", *saved.settings)) if name != "strength"]
    settings.sort(key=lambda name: (*FAMILIAR, name).index(name))
    return {
        "title": short(", ".join(runs["study"].unique()), LONGEST),
        "finding": finding(
            runs,
            rows,
            {group: changes[group] for group in rows.index[fed(rows)] if group in changes},
            longest=max((len(text.tokens) for text in texts), default=0),
            left_out=len(left_out),
        ),
        "settings": settings,
        "seeds": [name in SEEDS for name in settings],
        "kind": runs["kind"].iloc[0],
        "columns": [{"key": key, "name": name, "about": about} for key, name, about in COLUMNS],
        "runs": [
            {
                "id": row["run_id"],
                "row": rows.index.get_loc(row["group"]),
                "strength": _plain(row["strength"]),
                "settings": [_spelt(row[name]) for name in settings],
            }
            for row in runs.to_dict("records")
        ],
        "rows": [
            {"count": row["runs"], "measures": [_plain(row[key]) for key, *_ in COLUMNS]}
            for row in rows.to_dict("records")
        ],
        "leftOut": [{"id": one.run_id, "reason": one.reason} for one in left_out],
        "provenance": _provenance([saved.saved[run].status for run in runs.index]),
    }


def _stored(texts: Sequence[Text], saved: Runs) -> dict[str, object]:
    """The texts as rows of numbers, each list of tokens and of passes kept once."""
    read_by = saved.runs.reindex(columns=["model", "model.path", "dtype"])
    read_by["weights"] = [saved.saved[run].status.get("model_hash") for run in read_by.index]
    models = read_by.astype(str).agg(tuple, axis=1)
    names = [(models[text.run], text.prompt, text.step, text.first, text.tokens) for text in texts]
    plain = {name: place for place, name in reversed([*enumerate(names)]) if texts[place].plain}
    prompts = list(dict.fromkeys(text.prompt for text in texts))
    passes = list(dict.fromkeys(tuple(text.passes.tolist()) for text in texts))
    # a text that grows is the beginning of what it becomes
    longest: list[tuple[str, ...]] = []
    within: dict[tuple[str, ...], int] = {}
    for tokens in sorted(dict.fromkeys(text.tokens for text in texts), key=len, reverse=True):
        known = (n for n, one in enumerate(longest) if one[: len(tokens)] == tokens)
        within[tokens] = next(known, len(longest))
        if within[tokens] == len(longest):
            longest.append(tokens)
    return {
        "prompts": prompts,
        "tokens": longest,
        "passes": passes,
        "texts": [
            [
                read_by.index.get_loc(text.run),
                prompts.index(text.prompt),
                text.step,
                text.first,
                len(text.tokens),
                within[text.tokens],
                passes.index(tuple(text.passes.tolist())),
                place if text.plain else plain.get(names[place]),
            ]
            for place, text in enumerate(texts)
        ],
        "values": packed(texts),
    }


def _provenance(recorded: Sequence[Mapping[str, object]]) -> list[list[object]]:
    """What was recorded of how the runs were made: a name, and its different values."""
    chosen = {"started": slice(1), "finished": slice(-1, None)}  # of the first, of the last
    found: list[list[object]] = []
    for name in ("commit", "device", "command", "started", "finished"):
        kept = [short(str(one[name]), LONGEST) for one in recorded if one.get(name) is not None]
        values = sorted({*kept})
        found += [[name, values[chosen.get(name, slice(None))]]] if values else []
    dirty = sum(one.get("dirty") is True for one in recorded)
    if dirty:
        found.append(["changes", [f"{dirty} of {len(recorded)} with changes that no commit holds"]])
    return found


def _plain(value: Any) -> object:
    """As JSON can hold it: nothing for what is missing, words for what is no finite number."""
    if pd.isna(value):
        return None
    return str(value) if value in (math.inf, -math.inf) else value


def _spelt(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def _html(content: Mapping[str, object]) -> str:
    """`template.html` with everything in its place; only in the data is `<` escaped."""
    # the page's own files as one script that leaves nothing behind
    own = "\n".join(_read(f"script/{name}.js") for name in SCRIPTS)
    scripts = [_read("vendor/uPlot.iife.min.js"), f'(() => {{\n"use strict";\n{own}}})();\n']
    styles = [_read("vendor/uPlot.min.css"), _read("page.css")]
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; "
        "base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(content, separators=(",", ":"), allow_nan=False)
    parts = {
        "policy": policy,
        "styles": "\n".join(f"<style>{style}</style>" for style in styles),
        "data": data.replace("<", "\\u003c"),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    # in one go: nothing is looked for in what was put in
    return re.sub(r"<!-- (\w+) -->", lambda mark: parts[mark[1]], _read("template.html"))


def _hashes(contents: Sequence[str]) -> str:
    digests = (hashlib.sha256(content.encode("utf-8")).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
