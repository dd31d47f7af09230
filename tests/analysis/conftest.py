"""Writes synthetic run folders: a toy recursion with the shape of the real one, and no model.

Estimate j of the next pass depends on the estimates before j only, so that position j is final
from iteration max(j, 1), as in a real run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

TEXTS = {
    "harbour": (
        "The old ship came into the harbour at dawn .\n"
        '"How much for the lot ?" asked the clerk . " $ 20 , not a penny more ! " '
        "She laughed , \\xe2 and the gulls rose over the market , crying as if the sea "
        "itself had been sold to the first stranger who could count to twenty ☃ 🦑 "
    ),
    "rain": (
        "It had rained for nine days when the letter came . Nobody in the house could read , "
        "so they kept it by the stove until the schoolmaster walked up the hill . $x_1$ "
    ),
    "list": "one , two , three , four , five , six , seven , eight , nine , ten , one , two",
}


def tokens_of(text: str) -> list[str]:
    """Words with their leading space; newlines stand alone."""
    tokens: list[str] = []
    for index, word in enumerate(text.replace("\n", " \n ").split(" ")):
        if word:
            tokens.append(word if word == "\n" or index == 0 else f" {word}")
    return tokens


def solve(length: int, strength: float, damping: float, iterations: int, seed: int) -> np.ndarray:
    """(iterations, length) log-probs of a strictly triangular toy recursion."""
    random = np.random.default_rng(seed)
    base = -random.gamma(2.0, 1.3, length)
    weight = np.tril(random.normal(size=(length, length)), k=-1)
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    weight *= np.exp(-np.clip(distance - 1, 0, None) / 4.0)
    state = np.zeros(length)
    passes = []
    for _ in range(iterations):
        fed = state
        pull = weight @ (np.tanh(strength * state) + 0.3 * np.sin(3 * strength * state))
        state = np.minimum(base + 1.5 * pull, -1e-4)
        state[0] = 0.0
        passes.append(state)
        state = (1 - damping) * fed + damping * state
    return np.array(passes)


def config_of(study: str, **changes: object) -> dict[str, object]:
    config: dict[str, dict[str, object] | object] = {
        "study": study,
        "seed": 0,
        "model": {"name": "bundled", "path": "bundled", "tokenizer": "gpt2"},
        "feedback": {"kind": "log_prob", "strength": 0.0, "layers": "all", "shift": 1},
        "recompute": {
            "solver": "full",
            "iterations": 64,
            "tolerance": 0.0,
            "damping": 1.0,
            "start": "cold",
        },
        "generation": {"strategy": "greedy", "max_new_tokens": 0, "temperature": 1.0, "seed": 0},
        "prompts": {"file": None, "limit": None},
        "device": {"name": "cpu", "dtype": "float64"},
        "tracking": {"mode": "offline"},
        "runs_dir": "runs",
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value  # type: ignore[index]
        else:
            config[section] = value
    return config


def write_run(
    folder: Path,
    *,
    study: str = "sweep",
    prompts: dict[str, str] | None = None,
    steps: int = 0,
    state: str = "finished",
    drop_measures: tuple[str, ...] = (),
    **changes: object,
) -> Path:
    """One run folder at `folder`. `changes` are settings: `feedback__strength=0.5`."""
    folder.mkdir(parents=True)
    config = config_of(study, **changes)
    strength = float(config["feedback"]["strength"])  # type: ignore[index]
    iterations = int(config["recompute"]["iterations"])  # type: ignore[index]
    damping = float(config["recompute"]["damping"])  # type: ignore[index]
    pull = 0.6 * strength if config["feedback"]["kind"] == "prob" else strength  # type: ignore[index]
    chosen = prompts or TEXTS
    trajectory, measures, summaries = [], [], []
    for number, (prompt_id, text) in enumerate(chosen.items()):
        tokens = tokens_of(text)
        for step in range(steps + 1):
            length = len(tokens) - steps + step
            passes = solve(length, pull, damping, max(iterations, 3 * length), seed=number)
            exact, plain = passes[-1], passes[0]
            passes = passes[:iterations]
            trajectory.append(_trajectory(prompt_id, step, tokens, passes))
            measures.append(_measures(prompt_id, step, passes, exact))
        error = np.abs(passes - exact).max(axis=1)
        reached = np.flatnonzero(error < 1e-3)
        summaries.append(
            {
                "prompt_id": prompt_id,
                "text": text,
                "prompt_tokens": len(tokens) - steps,
                "generated_tokens": steps,
                "generated_text": "".join(tokens[len(tokens) - steps :]),
                "outcome": "settled" if error[-1] == 0 else "iteration_limit",
                "iterations": len(passes),
                "iterations_to_tolerance": int(reached[0]) + 1 if len(reached) else None,
                "reporting_tolerance": 1e-3,
                "rate": 0.31 if strength else None,
                "lyapunov": -0.4 + abs(strength),
                "nll": float(-passes[-1][1:].mean()),
                "nll_plain": float(-plain[1:].mean()),
                "kl_effect": (0.02 + 0.005 * number) * strength**2,
                "oracle_error_max": float(error[-1]),
                "seconds": 1.5,
            }
        )
    run_id = folder.name
    overall = {
        "outcome": summaries[0]["outcome"],
        "iterations_to_tolerance": None,
        "nll": float(np.mean([row["nll"] for row in summaries])),
        "nll_plain": float(np.mean([row["nll_plain"] for row in summaries])),
        "kl_effect": 0.02 * strength**2,
    }
    summary = {"run_id": run_id, "study": study, "prompts": summaries, "overall": overall}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    frame = pd.concat(measures, ignore_index=True).drop(columns=list(drop_measures))
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), folder / "iterations.parquet")
    table = pa.Table.from_pandas(pd.concat(trajectory, ignore_index=True), preserve_index=False)
    pq.write_table(table, folder / "trajectory.parquet")
    status = {"state": state, "commit": "0a1b2c3", "dirty": False, "finished": "2024-01-01"}
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return folder


def _trajectory(prompt_id: str, step: int, tokens: list[str], passes: np.ndarray) -> pd.DataFrame:
    count, length = passes.shape
    return pd.DataFrame(
        {
            "prompt_id": prompt_id,
            "step": step,
            "iteration": np.repeat(np.arange(1, count + 1), length),
            "position": np.tile(np.arange(length), count),
            "token_id": np.tile(np.arange(length), count),
            "token": tokens[:length] * count,
            "log_prob": passes.ravel(),
        }
    )


def _measures(prompt_id: str, step: int, passes: np.ndarray, exact: np.ndarray) -> pd.DataFrame:
    change = np.abs(np.diff(passes, axis=0))
    far = np.abs(passes - exact) > 1e-3
    front = np.where(far.any(axis=1), far.argmax(axis=1), passes.shape[1])
    return pd.DataFrame(
        {
            "prompt_id": prompt_id,
            "step": step,
            "iteration": np.arange(1, len(passes) + 1),
            "step_max": [None, *change.max(axis=1)],
            "step_rms": [None, *np.sqrt((change**2).mean(axis=1))],
            "settled_prefix": front,
            "oracle_error_max": np.abs(passes - exact).max(axis=1),
            "nll": -passes[:, 1:].mean(axis=1),
            "kl_step": [None, *(0.1 * 0.25 ** np.arange(len(passes) - 1))],
            "kl_effect": 0.01,
        }
    )


def write_study(folder: Path) -> Path:
    """Strengths on both sides of 0; with the largest, the longest text is not reached."""
    for strength in (-0.5, -0.1, 0.0, 0.1, 0.5, 2.0):
        write_run(
            folder / f"run_{strength:g}".replace(".", "p").replace("-", "m"),
            study=folder.name,
            feedback__strength=strength,
            recompute__iterations=40,
        )
    return folder


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("runs") / "sweep")
