"""Reads trained models: folders of `experiments.train`, and runs of `experiments.state_tracking`.

Weights are never loaded, only counted. Knows nothing of how models are compared.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from analysis.read.run_folder import DAMAGE, mapping, parquet, state_of
from analysis.read.saved import NotData, SavedModel

TRAINING = "depths.json"
CONTEST = "contestant"  # the section of the configuration that only a contest has
ELSEWHERE = frozenset({"corpus", "device", "tracking", "output", "runs_dir", "study"})
RATES = ("training.learning_rate", "training.matrix_learning_rate")


def accepts_training(folder: Path) -> bool:
    return (folder / TRAINING).is_file()


def accepts_contest(folder: Path) -> bool:
    """Whether it is a run of a contest, by its configuration."""
    if (folder / "accuracy.parquet").exists():
        return True
    try:
        return CONTEST in mapping(folder / "config.yaml")
    except NotData:
        return False


def read_training(folder: Path) -> SavedModel:
    """A model folder; losses in nats per token. Raises NotData if it is damaged."""
    depths = mapping(folder / TRAINING)
    try:
        settings = flat(mapping(folder / "training.yaml"))
        history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        nll, kl = ([float(value) for value in depths[name]] for name in ("nll", "kl"))  # type: ignore[attr-defined]
        full, per_token = depths["nll_full"], float(str(depths["characters_per_token"]))
        stateful = bool(kl)
        if not stateful:  # of a plain model, these say nothing
            settings = {
                k: v for k, v in settings.items() if not k.endswith(("passes", "every_pass"))
            }
        facts = {
            "stateful": stateful,
            "parameters": _parameters(folder / "model.safetensors"),
            "tokens_read": int(history[-1]["tokens_read"]),
            "nll_full": None if full is None else float(str(full)),
            "contracts": bool(depths["contracts"]) if stateful else None,
            "characters_per_token": per_token,
            "trained_depth": int(str(settings["training.passes"])) - 1 if stateful else None,
        }
        if per_token <= 0:
            raise ValueError("characters_per_token is not positive")
        if not nll:
            raise ValueError("depths.json has no losses")
    except (*DAMAGE, KeyError, IndexError, AttributeError, struct.error) as error:
        raise NotData(f"not a training that can be read ({_reason(error)})") from None
    curve = pd.DataFrame({"depth": range(len(nll)), "nll": nll})
    curve["kl"] = pd.Series(kl[: len(nll)], dtype=float)
    return SavedModel(folder.name, str(folder.resolve()), "training", settings, facts, curve)


def read_contest(folder: Path) -> SavedModel:
    """A run of a contest. Raises NotData unless it is finished and whole."""
    state_of(folder)
    settings = flat(mapping(folder / "config.yaml"))
    summary = mapping(folder / "summary.json")
    curve = parquet(folder / "accuracy.parquet")
    try:
        curve = curve[["depth", "level", "accuracy"]].astype({"depth": int, "level": int})
        curve["accuracy"] = curve["accuracy"].astype(float)
        passes = int(str(settings["contestant.passes"]))
        if passes == 1:
            for name in ("passes", "drawn", "through"):
                settings.pop(f"contestant.{name}", None)
        facts = {
            "stateful": passes > 1,
            "task": str(settings["task.name"]),
            "target": str(settings["task.target"]),
            "trained_level": int(str(settings["task.trained_level"])),
            "tested_level": int(str(settings["task.tested_level"])),
            "trained_depth": passes - 1 if passes > 1 else None,
            "chance": float(str(summary["chance"])),
            "layer_passes": float(str(summary["layer_passes"])),
            "seconds": float(str(summary["seconds"])),
            "solved_level": int(str(summary["solved_level"])),
        }
        wanted = {facts["trained_level"], facts["tested_level"]}
        if curve.empty or not wanted <= set(curve["level"]):
            raise ValueError("accuracy.parquet lacks levels")
    except (*DAMAGE, KeyError) as error:
        raise NotData(f"not a whole state-tracking run ({_reason(error)})") from None
    return SavedModel(folder.name, str(folder.resolve()), "state_tracking", settings, facts, curve)


def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """By dotted key, without what says only where a result was kept and made."""
    found: dict[str, object] = {}
    for key, value in settings.items():
        if prefix or key not in ELSEWHERE:
            found |= (
                flat(value, f"{prefix}{key}.")
                if isinstance(value, Mapping)
                else {f"{prefix}{key}": value}
            )
    return found


def _parameters(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is damaged")
        header = json.loads(file.read(length))
    return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
