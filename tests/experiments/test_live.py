"""W&B is told of a run while it is computed, a row a pass: read with the project's own reader."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.read.saved import NotData
from analysis.read.wandb_log import read_log
from experiments.converge.publish import AGGREGATES, history_rows
from experiments.tracking.tracker import stop_helper
from tests.forked import Forked

Compute = Callable[..., Path]
Start = Callable[..., Forked]
DEADLINE = 120.0  # seconds; nothing here should take a tenth of it
OFFLINE = "tracking.mode=offline"

pytestmark = pytest.mark.usefixtures("quiet_wandb")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    stop_helper()  # it still writes when an offline run has ended
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return read_log(path).history


def live_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in history if "settled_share" in row]


def test_a_run_that_is_still_computing_shows_the_rows_so_far(
    command: Callable[..., list[str]], start: Start, runs: Callable[[], list[Path]],
    status: Callable[[Path], dict[str, Any]],
) -> None:  # fmt: skip
    passes = 100_000  # of far more than the deadline
    process = start(command(OFFLINE, f"recompute.iterations={passes}", "recompute.tolerance=0"))
    deadline = time.monotonic() + DEADLINE
    seen: list[int] = []

    def read() -> list[int]:
        for folder in runs():
            for path in folder.glob("wandb/offline-run-*/*.wandb"):
                try:
                    return [row["iteration"] for row in live_rows(read_log(path).history)]
                except NotData:  # it has not begun
                    continue
        return []

    while len(seen) < 30:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{len(seen)} rows"
        time.sleep(0.02)
        seen = read()
    assert seen == list(range(1, len(seen) + 1)), "as they came"
    more = seen
    while len(more) <= len(seen):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
        more = read()
    (folder,) = runs()
    assert status(folder)["state"] == "running"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = read()
    assert len(more) <= len(kept) < passes
    assert kept == list(range(1, len(kept) + 1)), "what a killed run has shown stays"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["recompute.tolerance=0"],
        ["feedback.strength=2", "recompute.tolerance=0.05"],
        ["prompts.max_tokens=1"],
    ],
)
def test_the_rows_of_one_batch_are_those_of_its_files(compute: Compute, words: list[str]) -> None:
    folder = compute(OFFLINE, "prompts.limit=4", *words)
    history = [row for row in rows_of(folder) if "iteration" in row]
    assert history == live_rows(history), "nothing is told twice"
    assert [row["_step"] for row in history] == [row["iteration"] for row in history]
    expected = history_rows(folder)
    names = {*AGGREGATES, "iteration", "step_max_log10", "oracle_error_max_log10"}
    assert len(history) == len(expected)
    for found, row in zip(history, expected, strict=True):
        told = {name: value for name, value in row.items() if value is not None}
        # a mean of prompts adds them in another order
        assert {k: v for k, v in found.items() if k in names} == pytest.approx(told, rel=1e-12)
    prompts = json.loads((folder / "summary.json").read_text())["prompts"]
    settled = [prompt["outcome"] == "settled" for prompt in prompts]
    assert history[-1]["settled_share"] == sum(settled) / 4, "no tolerance or cycle counts"


@pytest.mark.parametrize(
    "words",
    [
        ["device.batch=2"],
        ["generation.max_new_tokens=2"],
        ["measures.oracle=false"],  # prefixes settle to where the last pass will end
    ],
)
def test_rows_of_the_whole_run_follow_those_that_could_not_be_of_it(
    compute: Compute, words: list[str]
) -> None:
    folder = compute(OFFLINE, "prompts.limit=4", *words)
    history = rows_of(folder)
    steps = [row["_step"] for row in history]
    assert steps == sorted(set(steps)), "W&B takes none that goes back"
    live = live_rows(history)
    assert live
    behind = [row for row in history if "iteration" in row and row not in live]
    assert history.index(behind[0]) > history.index(live[-1])
    expected = [
        {name: value for name, value in row.items() if value is not None}
        for row in history_rows(folder)
    ]
    assert [{k: v for k, v in row.items() if k[0] != "_"} for row in behind] == expected


@pytest.mark.parametrize("batch", ["auto", "1"])
def test_generation_tells_one_row_a_step(compute: Compute, batch: str) -> None:
    folder = compute(OFFLINE, "generation.max_new_tokens=3", f"device.batch={batch}")
    history = rows_of(folder)
    steps = [row for row in history if "generation_step" in row]
    batches = 1 if batch == "auto" else 2
    assert [row["generation_step"] for row in steps] == [1, 2, 3] * batches
    for row in steps:
        last = history[history.index(row) - 1]
        assert last["step"] == row["generation_step"]
        for name in ("iteration", "nll", "kl_effect", "oracle_error_max"):
            assert row[f"generation/{name}"] == last[name]
