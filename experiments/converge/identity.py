"""Which run some settings stand for: the folder of a configuration, found without a model's weights
in memory and without a device.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from experiments.converge.prompts import Prompt, content_hash, read_prompts
from experiments.converge.settings import ConvergeSettings, ModelSettings
from experiments.runs.folder import RunFolder, run_id
from experiments.settings import ConfigError
from stateful_gpt.checkpoint import CheckpointError, fingerprint


class Located:
    """The run of some settings. ``known`` keeps what many runs of a sweep have in common.

    Raises:
        ConfigError: the model or the prompts cannot be read.
    """

    def __init__(self, settings: ConvergeSettings, known: dict[str, Any] | None = None) -> None:
        known = {} if known is None else known
        chosen = repr(settings.model)
        if chosen not in known:
            known[chosen] = _identity(settings.model)
        self.model: str = known[chosen]
        chosen = repr(settings.prompts)
        if chosen not in known:
            prompts = read_prompts(settings.prompts)
            known[chosen] = (prompts, content_hash(prompts))
        self.prompts: list[Prompt] = known[chosen][0]
        self.folder = RunFolder(
            settings, run_id(settings, model=self.model, prompts=known[chosen][1])
        )


def cell_key(settings: ConvergeSettings) -> str:
    """Names a cell of a sweep by its settings alone, also where no run can be located."""
    text = json.dumps(settings.plain(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _identity(model: ModelSettings) -> str:
    """A hash of the model, and of the tokenizer where that is not the model's own."""
    try:
        weights = fingerprint(model.path)
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"model.path {model.path!r} cannot be read ({error.strerror or error})"
        ) from None
    if model.tokenizer is None:
        return weights
    try:
        named = model.tokenizer in ("gpt2", "byte")
        content = model.tokenizer.encode() if named else Path(model.tokenizer).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"model.tokenizer must be gpt2, byte or a readable file, got {model.tokenizer!r}"
            f" ({error.strerror or error})"
        ) from None
    return f"{weights} {hashlib.sha256(content).hexdigest()}"
