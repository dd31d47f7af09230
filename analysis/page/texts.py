"""The estimates of a study as the page stores them: cut to 0.01 nats, and thinned to fit.

Knows nothing of runs' settings, of HTML, or of what the estimates mean.
"""

import base64
import itertools
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

PER_NAT = 100  # stored values are hundredths of a nat
MISSING = np.iinfo(np.int16).min  # an estimate that is no number
# what a larger study gives up: how it is said, and how many are kept at each of the LEVELS
GIVEN_UP = {
    "passes": ("at most {} of the passes of each text, the early ones all", 1),
    "steps": ("at most {} of the generation steps of each text, evenly spread", 0.5),
    "prompts": ("the first {} of the texts of each run", 0.5),
    "runs": ("texts of {} of the runs, evenly spread", 2),
}
LEVELS = (32, 16, 8, 4, 2)


@dataclass(frozen=True, eq=False)
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
    tolerance: Mapping[Any, float],
    still: Collection[tuple[int, str]],
    cold: Collection[int],
) -> Iterator[Text]:
    """Every text of a frame with run, prompt_id, step, iteration, position, token, log_prob.

    `tolerance` (nats, by run) says how near its end an estimate has settled; `still` lists the
    (run, prompt) whose estimates had come to rest, so that a change in the last pass is the last;
    `cold` the runs of which the first pass of every step is plain, not that of the first alone.
    """
    keys: Any
    for keys, rows in trajectory.groupby(["run", "prompt_id", "step"], sort=False, observed=True):
        run, prompt, step = keys
        passes, at_pass = np.unique(rows["iteration"], return_inverse=True)  # (P,)
        positions, begin, at = np.unique(  # (T,)
            rows["position"], return_index=True, return_inverse=True
        )
        exact = np.full((len(passes), len(positions)), np.nan)  # nats
        exact[at_pass, at] = rows["log_prob"].to_numpy(dtype=float)
        numbers = np.isfinite(exact)
        scaled = np.round(np.where(numbers, exact, 0.0) * PER_NAT).clip(MISSING + 1, -MISSING - 1)
        values = np.where(numbers, scaled, MISSING).astype(np.int16)
        # a NaN is near to nothing, not even to itself
        away = ~(np.abs(exact - exact[-1]) <= tolerance[run])
        settles = np.where(away.any(axis=0), len(passes) - away[::-1].argmax(axis=0), 0)
        settles = passes[np.minimum(settles, len(passes) - 1)]
        moving = (settles == passes[-1]) & away[:-1].any(axis=0) & ((run, prompt) not in still)
        unpredicted = ~numbers.any(axis=0)  # nothing predicts the first token
        settles = np.select([unpredicted, moving | ~numbers[-1]], [passes[0], 0], settles)
        end = np.flatnonzero((values != values[-1]).any(axis=1)).max(initial=-1) + 2
        yield Text(
            run=int(run),
            prompt=str(prompt),
            step=int(step),
            first=int(positions[0]),
            tokens=tuple(map(str, rows["token"].iloc[begin])),
            passes=passes[:end],
            values=values[:end],
            settles=settles.astype(np.uint16),
            plain=step == 0 or run in cold,
        )


def thinned(texts: Sequence[Text]) -> Iterator[tuple[list[Text], list[str]]]:
    """The texts, sorted, then ever fewer of them, each time with a sentence per thing given up."""
    kept, said = list(texts), dict[str, str]()
    yield kept, []
    # whole runs last: with them go strengths that a reader would compare
    order = sorted(itertools.product(LEVELS, GIVEN_UP.items()), key=lambda one: one[1][0] == "runs")
    for level, (what, (sentence, share)) in order:
        most = int(level * share)
        fewer = _thin(kept, what, most)
        if fewer != kept:
            kept, said[what] = fewer, sentence.format(most)
            yield kept, list(said.values())
    yield [], ["none of the texts"]


def _thin(texts: list[Text], what: str, most: int) -> list[Text]:
    """At most so many passes and steps of each text, prompts of each run, or runs."""
    if what == "passes":
        return [_fewer_passes(text, most) for text in texts]
    depth = ("runs", "prompts", "steps").index(what) + 1
    paths = [(text.run, text.prompt, text.step)[:depth] for text in texts]
    kept: set[tuple[object, ...]] = set()
    for _, same in itertools.groupby(dict.fromkeys(paths), key=lambda path: path[:-1]):
        choices = list(same)
        places = np.linspace(len(choices) - 1, 0, min(most, len(choices))).round().astype(int)
        # of prompts the first, else last and first, and others evenly between
        kept |= {*choices[:most]} if what == "prompts" else {choices[place] for place in places}
    return [text for text, path in zip(texts, paths, strict=True) if path in kept]


def _fewer_passes(text: Text, most: int) -> Text:
    """The first half of `most` in a row, then ever further apart up to the last."""
    count = len(text.passes)
    if count <= most:
        return text
    early = most // 2
    late = np.geomspace(count - 1, early, most - early).round().astype(int)
    rows = np.unique(np.concatenate([np.arange(early), late]))
    return replace(text, passes=text.passes[rows], values=text.values[rows])


def packed(texts: Sequence[Text]) -> str:
    """Base64 of zlib of: all low bytes, then all high bytes, of 16-bit little-endian numbers.

    The numbers are, text by text, the first pass, then each pass less the one before it (modulo
    2^16), pass after pass; and after all texts, text by text, the pass at which each token settles.
    """
    changes = [np.diff(text.values.astype(int), axis=0, prepend=0).ravel() for text in texts]
    numbers = np.concatenate([*changes, *(text.settles for text in texts), np.zeros(0, int)])
    octets = (numbers & 0xFFFF).astype("<u2").view(np.uint8).reshape(-1, 2)
    return base64.b64encode(zlib.compress(octets.T.tobytes(), 9)).decode("ascii")
