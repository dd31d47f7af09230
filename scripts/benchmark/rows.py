"""Rows of a benchmark: a number with its range over the repeats, and what was asked for.

A benchmark's ``ROWS`` maps the keys of rows to the function of ``quick`` that measures them.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Measures = dict[tuple[str, ...], Callable[..., Iterable["Row"]]]


@dataclass(frozen=True)
class Row:
    """One measured number; ``target`` is such as ``>= 2``, or empty where nothing is asked."""

    key: str
    value: float
    low: float
    high: float
    target: str
    met: bool
    note: str


def row(key: str, values: list[float], *, target: str = "", note: str) -> Row:
    value = statistics.median(values)
    sign, _, limit = target.partition(" ")
    met = not target or (value <= float(limit) if sign == "<=" else value >= float(limit))
    return Row(key, value, min(values), max(values), target, met, note)


def ratio(key: str, above: list[float], below: list[float], *, target: str, note: str) -> Row:
    return row(key, [a / b for a, b in zip(above, below, strict=True)], target=target, note=note)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_turns(*contestants: Callable[[], object], repeats: int) -> list[list[float]]:
    """Seconds of each contestant, run one after the other ``repeats`` times after one warm-up."""
    for work in contestants:
        work()
    rounds = [[seconds(work) for work in contestants] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]
