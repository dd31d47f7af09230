"""The estimates of a study as the page stores them: cut to 0.01 nats, and thinned to fit.

Knows nothing of runs' settings, of HTML, or of what the estimates mean.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pandas as pd

PER_NAT = 100  # stored values are hundredths of a nat
MISSING = np.iinfo(np.int16).min  # an estimate that is no number
# what a larger study gives up, in this order, until it fits
THINNING = (
    ("passes", 32),
    ("steps", 16),
    ("prompts", 16),
    ("passes", 16),
    ("steps", 8),
    ("prompts", 4),
    ("runs", 64),
    ("passes", 10),
    ("prompts", 2),
    ("runs", 32),
    ("prompts", 1),
    ("steps", 2),
    ("runs", 12),
    ("passes", 6),
    ("runs", 4),
    ("steps", 1),
    ("runs", 1),
    ("passes", 2),
)


@dataclass(frozen=True)
class Text:
    """What one run estimated about one prompt at one generation step."""

    run: int
    prompt: str
    step: int
    first: int  # position of the first token
    tokens: tuple[str, ...]  # T
    passes: np.ndarray  # (P,) the passes that are kept, ascending; after the last nothing moves
    values: np.ndarray  # (P, T) int16, 1 / PER_NAT nats; MISSING where there is no number
    settles: np.ndarray  # (T,) uint16: the pass from which an estimate stays; 0: it still moved
    plain: bool  # whether the first pass is the plain model's


def texts_of(
    trajectory: pd.DataFrame,
    *,
    tolerance: Mapping[int, float],
    still: Collection[tuple[int, str]],
    cold: Collection[int],
) -> list[Text]:
    """Every text of a frame with run, prompt_id, step, iteration, position, token, log_prob.

    `tolerance` (nats, by run) says how near its end an estimate has settled; `still` lists the
    (run, prompt) whose estimates had come to rest, so that a change in the last pass is the last;
    `cold` the runs of which every step begins with a plain pass, not the first alone.
    """
    texts = []
    for key, rows in trajectory.groupby(["run", "prompt_id", "step"], observed=True):
        run, prompt, step = cast(tuple[int, str, int], key)
        texts.append(
            _text(
                rows,
                run=run,
                prompt=prompt,
                step=step,
                tolerance=tolerance[run],
                still=(run, prompt) in still,
                plain=step == 0 or run in cold,
            )
        )
    return texts


def _text(
    rows: pd.DataFrame,
    *,
    run: int,
    prompt: str,
    step: int,
    tolerance: float,
    still: bool,
    plain: bool,
) -> Text:
    passes, row = np.unique(rows["iteration"].to_numpy(), return_inverse=True)
    positions, first, column = np.unique(
        rows["position"].to_numpy(), return_index=True, return_inverse=True
    )
    exact = np.full((len(passes), len(positions)), np.nan)  # (P, T) nats
    exact[row, column] = rows["log_prob"].to_numpy()
    tokens = tuple(str(token) for token in rows["token"].iloc[first])
    numbers = np.isfinite(exact)
    scaled = np.clip(np.round(np.where(numbers, exact, 0.0) * PER_NAT), MISSING + 1, -MISSING - 1)
    values = np.where(numbers, scaled, MISSING).astype(np.int16)
    # a NaN is near to nothing, not even to itself
    away = ~(np.abs(exact - exact[-1]) <= tolerance)
    settles = np.where(away.any(axis=0), len(passes) - away[::-1].argmax(axis=0), 0)
    settles = passes[np.minimum(settles, len(passes) - 1)]
    moving = (settles == passes[-1]) & away[:-1].any(axis=0) & (not still)
    unpredicted = ~numbers.any(axis=0)  # nothing predicts the first token
    settles = np.where((moving | ~numbers[-1]) & ~unpredicted, 0, settles)
    settles = np.where(unpredicted, passes[0], settles).astype(np.uint16)
    changes = np.flatnonzero((values != values[-1]).any(axis=1))
    end = changes[-1] + 2 if len(changes) else 1
    return Text(
        run=int(run),
        prompt=str(prompt),
        step=int(step),
        first=int(positions[0]),
        tokens=tokens,
        passes=passes[:end],
        values=values[:end],
        settles=settles,
        plain=plain,
    )


def thinned(texts: Sequence[Text]) -> Iterator[tuple[list[Text], list[str]]]:
    """The texts, then ever fewer of them, each time with a sentence per thing given up."""
    kept, said = list(texts), dict[str, str]()
    yield kept, []
    for what, most in THINNING if kept else ():
        fewer = _thin(kept, what, most)
        if fewer is not None:
            kept, said[what] = fewer
            yield kept, list(said.values())


def _thin(texts: list[Text], what: str, most: int) -> tuple[list[Text], str] | None:
    """At most so many passes, steps, prompts or runs; None if there are no more than that."""
    if what == "passes":
        longest = max(len(text.passes) for text in texts)
        if longest <= most:
            return None
        fewer = [_fewer_passes(text, most) for text in texts]
        return fewer, f"at most {most} passes of each text, the early ones all"
    if what == "steps":
        last: dict[tuple[int, str], set[int]] = {}
        for text in texts:
            last.setdefault((text.run, text.prompt), set()).add(text.step)
        if max(map(len, last.values())) <= most:
            return None
        chosen = {key: _spread(sorted(steps), most) for key, steps in last.items()}
        fewer = [text for text in texts if text.step in chosen[text.run, text.prompt]]
        return (
            fewer,
            f"at most {most} generation step{'s' * (most > 1)} of each text, evenly spread",
        )
    if what == "prompts":
        prompts = list(dict.fromkeys(text.prompt for text in texts))
        if len(prompts) <= most:
            return None
        fewer = [text for text in texts if text.prompt in prompts[:most]]
        return fewer, "the first text" if most == 1 else f"the first {most} texts"
    runs = list(dict.fromkeys(text.run for text in texts))
    if len(runs) <= most:
        return None
    wanted = _spread(runs, most)
    fewer = [text for text in texts if text.run in wanted]
    return (
        fewer,
        "the texts of one run" if most == 1 else f"the texts of {most} runs, evenly spread",
    )


def _spread(items: list[int], most: int) -> set[int]:
    """First and last, and others evenly between; of one alone the last."""
    places = np.linspace(len(items) - 1, 0, min(most, len(items))).round().astype(int)
    return {items[place] for place in places}


def _fewer_passes(text: Text, most: int) -> Text:
    """The first half of `most` in a row, then ever further apart up to the last."""
    count = len(text.passes)
    if count <= most:
        return text
    early = most // 2
    late = np.geomspace(early, count - 1, most - early).round().astype(int)
    rows = np.unique(np.concatenate([np.arange(early), late]))
    return replace(text, passes=text.passes[rows], values=text.values[rows])


def packed(texts: Sequence[Text]) -> str:
    """Base64 of zlib of: all low bytes, then all high bytes, of 16-bit little-endian numbers.

    The numbers are, text by text, the first pass, then each pass less the one before it (modulo
    2^16), pass after pass; and after all texts, text by text, the pass at which each token settles.
    """
    parts: list[np.ndarray] = []
    for text in texts:
        passes = text.values.astype(np.int32)
        parts.append(np.diff(passes, axis=0, prepend=0).ravel())
    parts += [text.settles.astype(np.int32) for text in texts]
    numbers = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    octets = (numbers & 0xFFFF).astype("<u2").view(np.uint8).reshape(-1, 2)
    return base64.b64encode(zlib.compress(octets.T.tobytes(), 9)).decode("ascii")
