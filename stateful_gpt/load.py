"""Any model by the name that a user gives it: the one place that asks which code reads it."""

from pathlib import Path
from typing import Literal

import torch

from stateful_gpt import checkpoint, hugging_face_folder
from stateful_gpt.checkpoint import BUNDLED, Checkpoint, download
from stateful_gpt.hugging_face_folder import PREPARED
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.untrusted import SETTINGS_SIZE, parse_json, read_regular
from stateful_gpt.weights import CONFIG

Library = Literal["stateful_gpt", "transformers"]


def load_model(
    source: str | Path,
    *,
    library: Library | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Checkpoint[LanguageModel]:
    """What ``load_checkpoint`` or ``load_hugging_face`` takes, in evaluation mode.

    Args:
        library: what reads it; None: this one where it can, transformers else.

    Raises:
        CheckpointError: as they do.
    """
    if (library or library_of(source)) == "transformers":
        return hugging_face_folder.load_hugging_face(
            source, tokenizer=tokenizer, dtype=dtype, device=device
        )
    return checkpoint.load_checkpoint(source, tokenizer=tokenizer, dtype=dtype, device=device)


def fingerprint(source: str | Path, *, library: Library) -> str:
    """A hash of the weights, settings and tokenizer of a model.

    Raises:
        CheckpointError: there is no such model, or a part of it cannot be read.
    """
    if library == "transformers":
        return hugging_face_folder.fingerprint(source)
    return checkpoint.fingerprint(source)


def library_of(source: str | Path) -> Library:
    """This one for what lies in formats of its own, nanoGPT's or GPT-2's, and for what is no model,
    which it refuses.
    """
    if str(source) in BUNDLED:
        return "stateful_gpt"
    if str(source) in PREPARED:
        return "transformers"
    path = Path(source)
    try:
        folder = path if path.exists() else download(str(source), (CONFIG,), extra="hub")
        settings = parse_json(read_regular(folder / CONFIG, most=SETTINGS_SIZE))
    except (OSError, ValueError):
        return "stateful_gpt"
    return "stateful_gpt" if settings.get("model_type", "gpt2") == "gpt2" else "transformers"
