"""Reads trained models: folders of `experiments.train`, and runs of `experiments.state_tracking`.

Weights are never loaded, only counted. Knows nothing of how models are compared.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open

from analysis.read.run_folder import DAMAGE, check, flat, mapping, parquet, regular, state_of
from analysis.read.saved import NotData, SavedModel

SETTINGS = "training.yaml"  # the first file of a training
TRAINING = "depths.json"  # its last
CONTEST = "accuracy.parquet"
# what says only where texts and a result were kept, where it was made, and when it was looked at
PLACES = ("study", "runs_dir", "output", "corpus.train", "corpus.held_out", "device", "tracking")
LOOKS = ("save_every", "record_every", "evaluate_every", "evaluate_windows")
ELSEWHERE = (*PLACES, *(f"training.{name}" for name in LOOKS))
RATES = ("training.learning_rate", "training.matrix_learning_rate")
OF_RECURRENCE = ("passes", "every_pass", "drawn", "through", "evaluate_depth")  # not of plain ones


def read_training(folder: Path) -> SavedModel:
    """A model folder; losses in nats per token. Raises NotData if it is unfinished or damaged."""
    depths = mapping(folder / TRAINING)
    check(folder, depths.get("checksums"))
    settings = mapping(folder / SETTINGS)
    with _damage_as("not a training that can be read"):
        history = json.loads(regular(folder / "history.json").read_text(encoding="utf-8"))
        if not depths["nll"]:
            raise ValueError(f"{TRAINING} has no losses")
        curve = pd.DataFrame({"depth": range(len(depths["nll"])), "nll": depths["nll"]})
        curve["kl"] = pd.Series(depths["kl"], dtype=float)
        stateful = len(depths["kl"]) > 0
        with safe_open(regular(folder / "model.safetensors"), framework="numpy") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        facts = {
            "stateful": stateful,
            "parameters": sum(map(math.prod, shapes)),
            "tokens_read": int(history[-1]["tokens_read"]),
            "nll_full": depths["nll_full"],
            "contracts": bool(depths["contracts"]) if stateful else None,
            "characters_per_token": float(depths["characters_per_token"]),
            # a hash of texts and starting weights, which early versions did not keep
            "sources": str(depths.get("sources") or "") or None,
            "trained_depth": int(settings["training"]["passes"]) - 1 if stateful else None,
        }
        return _model(folder, "training", settings, facts, curve.astype({"nll": float}))


def read_contest(folder: Path) -> SavedModel:
    """A run of a contest. Raises NotData unless it is finished and whole."""
    state_of(folder)
    settings = mapping(folder / "config.yaml")
    summary = mapping(folder / "summary.json")
    curve = parquet(folder / CONTEST).to_pandas()
    with _damage_as("not a whole state-tracking run"):
        task, passes = settings["task"], int(settings["contestant"]["passes"])
        facts = {
            "stateful": passes > 1,
            "task": str(task["name"]),
            "target": str(task["target"]),
            "trained_level": int(task["trained_level"]),
            "tested_level": int(task["tested_level"]),
            "trained_depth": passes - 1 if passes > 1 else None,
            **{name: float(summary[name]) for name in ("chance", "layer_passes", "seconds")},
            "solved_level": int(summary["solved_level"]),
        }
        curve = curve.astype({"depth": int, "level": int, "accuracy": float})
        if not {facts["trained_level"], facts["tested_level"]} <= set(curve["level"]):
            raise ValueError(f"{CONTEST} lacks levels")
        return _model(folder, "state_tracking", settings, facts, curve)


def _model(
    folder: Path, kind: str, config: dict[str, Any], facts: dict[str, Any], curve: pd.DataFrame
) -> SavedModel:
    settings = {
        key: value
        for key, value in flat(config).items()
        if not key.startswith(ELSEWHERE) and (facts["stateful"] or not key.endswith(OF_RECURRENCE))
    }
    return SavedModel(folder.name, str(folder.resolve()), kind, settings, facts, curve)


@contextmanager
def _damage_as(what: str) -> Iterator[None]:
    try:
        yield
    except (*DAMAGE, LookupError, AttributeError, ArithmeticError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise NotData(f"{what} ({reason})") from None
