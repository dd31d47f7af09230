"""Rows of a benchmark: a ratio with its range, what was asked, and where it was measured."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One measured number: ``value``, its range over the repeats, and what was asked for."""

    key: str
    value: float
    low: float
    high: float
    target: str
    met: bool
    note: str


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


def ratio(key: str, above: list[float], below: list[float], *, target: str, note: str) -> Row:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return row(key, ratios, target=target, note=note)


def row(key: str, values: list[float], *, target: str, note: str) -> Row:
    value = statistics.median(values)
    limit = float(target.split()[1])
    met = value <= limit if target.startswith("<=") else value >= limit
    return Row(key, value, min(values), max(values), target, met, note)


def hardware() -> dict[str, object]:
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "commit": commit or None,
    }


def arguments(name: str, about: str | None) -> argparse.Namespace:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(prog=f"python -m scripts.benchmark {name}", description=about)
    parser.add_argument("--quick", action="store_true", help="at most two minutes, on less")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY", help="some rows")
    return parser.parse_args()


def report(rows: Iterable[Row], *, as_json: bool, quick: bool) -> int:
    """Print each row as soon as it is measured."""
    machine = hardware()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    done = []
    for one in rows:
        mark = "met" if one.met else "MISSED"
        spread = f"{one.value:8.2f}  ({one.low:.2f} to {one.high:.2f})"
        print(f"{one.key:22} {spread:30} {one.target:8} {mark:6}  {one.note}", flush=True)
        done.append(one)
    if as_json:
        values = {one.key: one.value for one in done}
        print(json.dumps({**values, **machine, "quick": quick, "rows": [asdict(r) for r in done]}))
    return 0
