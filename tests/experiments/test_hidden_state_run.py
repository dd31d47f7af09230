"""Runs that feed hidden states back: the same files and measures as any other run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from stateful_gpt.checkpoint import load_checkpoint
from stateful_gpt.feedback import Feedback
from stateful_gpt.oracle import left_to_right

Compute = Callable[..., Path]
Converge = Callable[..., tuple[int, str, str]]


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    return (
        pq.read_table(folder / "trajectory.parquet").to_pandas(),
        pq.read_table(folder / "iterations.parquet").to_pandas(),
        json.loads((folder / "summary.json").read_text()),
    )


@pytest.mark.parametrize(
    "words",
    [
        ("feedback.kind=hidden_state", "feedback.strength=0.7"),
        ("feedback.kind=log_prob", "feedback.strength=0.4", "feedback.hidden_strength=0.7"),
    ],
)
def test_the_run_ends_at_the_oracle_and_follows_hidden_states(
    compute: Compute, stateful_folder: Path, words: tuple[str, ...]
) -> None:
    every = ("recompute.iterations=14", "recompute.tolerance=0")  # of 12 tokens
    folder = compute(f"model.path={stateful_folder}", "device.dtype=float64", *every, *words)
    trajectory, iterations, summary = tables(folder)
    feedback = Feedback.of_kind("hidden_state", 0.7)
    if "feedback.kind=log_prob" in words:
        feedback = Feedback(strength=0.4, hidden_strength=0.7)
    model = load_checkpoint(stateful_folder, dtype=torch.float64).model
    assert summary["trained_passes"] == 3
    for prompt in summary["prompts"]:
        rows = trajectory[trajectory["prompt_id"] == prompt["prompt_id"]]
        last = rows[rows["iteration"] == rows["iteration"].max()]
        exact = left_to_right(model, torch.tensor([last["token_id"].tolist()]), feedback)[0]
        # float64 through a dozen passes
        np.testing.assert_allclose(last["log_prob"][1:], exact.numpy()[1:], atol=1e-10)
        assert np.isnan(last["log_prob"].iloc[0]), "nothing predicts it"
        assert prompt["outcome"] == "settled"
        measured = iterations[iterations["prompt_id"] == prompt["prompt_id"]]
        moved = measured["hidden_step_norm"]
        assert moved.isna().tolist() == [True] + [False] * (len(moved) - 1)
        assert moved.iloc[1] > 0
        assert moved.iloc[-1] == 0, "after T passes nothing moves"
        assert measured["oracle_error_max"].iloc[-1] <= 1e-10


def test_same_position_feedback_has_no_oracle_but_an_end(
    compute: Compute, stateful_folder: Path
) -> None:
    folder = compute(
        f"model.path={stateful_folder}",
        "feedback.kind=hidden_state",
        "feedback.strength=0.02",
        "feedback.shift=0",
        "recompute.iterations=40",
        "recompute.tolerance=1e-5",
        "reporting_tolerance=1e-3",
    )
    trajectory, iterations, summary = tables(folder)
    for prompt in summary["prompts"]:
        assert prompt["outcome"] == "within_tolerance"
        assert prompt["oracle_error_max"] is None
        assert prompt["lyapunov"] is None
        rows = trajectory[trajectory["prompt_id"] == prompt["prompt_id"]]
        grid = (
            rows.pivot(index="iteration", columns="position", values="log_prob").to_numpy().copy()
        )
        assert np.isnan(grid[:, 0]).all(), "nothing predicts it"
        grid[:, 0] = 0.0
        away = np.abs(grid - grid[-1]).max(axis=1)
        reached = 1 + max(np.flatnonzero(away > 1e-3), default=-1) + 1
        assert prompt["iterations_to_tolerance"] == reached
        prefix = iterations[iterations["prompt_id"] == prompt["prompt_id"]]["settled_prefix"]
        assert prefix.iloc[-1] == grid.shape[1]
        assert prefix.is_monotonic_increasing


@pytest.mark.parametrize(("strength", "outcome"), [("1e300", "diverged"), ("3.0", "not settled")])
def test_what_does_not_settle_is_called_that(
    compute: Compute, stateful_folder: Path, strength: str, outcome: str
) -> None:
    folder = compute(
        f"model.path={stateful_folder}",
        "feedback.kind=hidden_state",
        f"feedback.strength={strength}",
        "feedback.shift=0",
        "recompute.iterations=30",
    )
    _, _, summary = tables(folder)
    found = {prompt["outcome"] for prompt in summary["prompts"]}
    assert found <= ({"diverged"} if outcome == "diverged" else {"iteration_limit", "cycle"})
    assert all(prompt["iterations_to_tolerance"] is None for prompt in summary["prompts"])


def test_generation_at_full_depth_is_the_same_by_window_and_in_full(
    compute: Compute, stateful_folder: Path
) -> None:
    words = (
        f"model.path={stateful_folder}",
        "feedback.kind=hidden_state",
        "device.dtype=float64",
        "generation.max_new_tokens=6",
        "recompute.start=carried",
    )
    texts = []
    for solver in (("recompute.solver=full",), ("recompute.solver=windowed", "recompute.window=1")):
        _, _, summary = tables(compute(*words, *solver, "recompute.iterations=20"))
        texts.append([(p["generated_text"], round(p["nll"], 9)) for p in summary["prompts"]])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["feedback=hidden_state"], ["no", "gate", "bundled_stateful"]),
        (["feedback.hidden_strength=1"], ["gate", "bundled_stateful"]),
        (["feedback=hidden_state", "feedback.hidden_strength=1"], ["feedback.hidden_strength"]),
        (["feedback=none", "feedback.hidden_strength=1"], ["feedback.hidden_strength", "none"]),
        (["feedback=hidden_state", "feedback.layers=[0]"], ["feedback.layers", "all", "[0]"]),
        (["feedback=hidden_state", "feedback.shift=2"], ["feedback.shift", "0 or 1", "2"]),
        (
            ["feedback=hidden_state", "feedback.shift=0", "recompute=windowed"],
            ["feedback.shift", "1", "windowed"],
        ),
    ],
)
def test_an_impossible_feedback_is_one_sentence(
    converge: Converge, overrides: list[str], words: list[str], runs: Callable[[], list[Path]]
) -> None:
    code, _, err = converge(*overrides)
    assert code == 2
    assert re.fullmatch(r"error: .+\n", err), "one line"
    for word in words:
        assert word in err
    assert runs() == []
