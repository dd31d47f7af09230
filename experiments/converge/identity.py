"""Which run some settings stand for: the folder of a configuration, found without a model's weights
in memory and without a device.
"""

import hashlib
from pathlib import Path
from typing import Any

from experiments.converge.prompts import content_hash, read_prompts
from experiments.converge.settings import ConvergeSettings, ModelSettings
from experiments.runs.files import short_hash
from experiments.runs.folder import RunFolder
from experiments.settings import ConfigError
from stateful_gpt.checkpoint import CheckpointError, fingerprint
from stateful_gpt.console import cut
from stateful_gpt.untrusted import TOKENIZER_SIZE, read_regular

# how random numbers come from the seeds; another number for another way. Runs from before there
# was one, whose streams of random numbers met, keep their names and files: these are others
DRAWS = 2


def locate(settings: ConvergeSettings, known: dict[Any, Any] | None = None) -> RunFolder:
    """The run that these settings stand for.

    Args:
        known: keeps what is read, for other runs of a sweep: of ``settings.model`` its identity,
            of ``settings.prompts`` the prompts and their hash.

    Raises:
        ConfigError: the model or the prompts cannot be read.
    """
    known = {} if known is None else known
    if settings.model not in known:
        known[settings.model] = _identity(settings.model)
    if settings.prompts not in known:
        prompts = read_prompts(settings.prompts)
        known[settings.prompts] = (prompts, content_hash(prompts))
    name = run_id(settings, model=known[settings.model], prompts=known[settings.prompts][1])
    return RunFolder(Path(settings.runs_dir, settings.study, name), settings.plain())


def run_id(settings: ConvergeSettings, *, model: str, prompts: str) -> str:
    """A short hash of everything that can change a result.

    Device, output paths and tracking cannot; the model and the prompts count by their content
    (``model``, ``prompts``: hashes of it), wherever their files lie.
    """
    plain = settings.deciding()
    plain["prompts"] = {"content": prompts, "max_tokens": settings.prompts.max_tokens}
    plain["model"] = model
    if settings.generation.strategy == "sample" and settings.generation.max_new_tokens > 0:
        plain["generation"]["draws"] = DRAWS
    return short_hash(plain)


def _identity(model: ModelSettings) -> str:
    """A hash of the model, and of the tokenizer where that is not the model's own."""
    try:
        weights = fingerprint(model.path, library=model.library)
    except (CheckpointError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"model.path {cut(repr(model.path))} cannot be read: {why}") from None
    if model.tokenizer is None:
        return weights
    content = model.tokenizer.encode()
    try:
        if model.tokenizer not in ("gpt2", "byte"):
            content = read_regular(model.tokenizer, most=TOKENIZER_SIZE)
    except CheckpointError as error:
        raise ConfigError(
            f"model.tokenizer must be gpt2, byte or a readable file: {error}"
        ) from None
    return f"{weights} {hashlib.sha256(content).hexdigest()}"
