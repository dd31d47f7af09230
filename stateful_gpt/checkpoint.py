"""Load and save models: this project's folders, nanoGPT's ckpt.pt, published GPT-2 folders.

Files are untrusted: nothing in them is executed, every name and shape is checked, and whatever is
wrong with one is a :class:`CheckpointError` whose message is one sentence.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save

from stateful_gpt.console import cut
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.model import GPT
from stateful_gpt.tokenizer import BytePairs, Characters, Tokenizer, load_tokenizer, save_tokenizer
from stateful_gpt.untrusted import CheckpointError as CheckpointError
from stateful_gpt.untrusted import open_regular
from stateful_gpt.weights import (
    CONFIG,
    FORMAT,
    NANOGPT_TOKENIZER,
    TOKENIZER,
    WEIGHTS,
    build_model,
    read_folder,
    read_nanogpt,
)

NANOGPT_WEIGHTS = "ckpt.pt"
BUNDLED = ("bundled", "bundled_stateful")

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

Model = TypeVar("Model", bound=LanguageModel, covariant=True)


@dataclass(frozen=True)
class Checkpoint(Generic[Model]):
    """A model ready to run, and the tokenizer that its ids belong to.

    ``source`` is what was asked for; of a name on the hub it is ``NAME@REVISION``.
    ``trained_passes`` is the number of passes a model with hidden-state feedback was trained in,
    where its folder says so.
    """

    model: Model
    tokenizer: Tokenizer
    source: str
    trained_passes: int | None = None


def load_checkpoint(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Checkpoint[GPT]:
    """Load a model in evaluation mode.

    Args:
        source: ``bundled``; a folder of this project, of a published GPT-2 (``config.json`` and
            ``model.safetensors``) or of nanoGPT's (``ckpt.pt``); that file; or a hub name such as
            ``gpt2``, which needs a network.
        tokenizer: ``gpt2``, ``byte`` or a file. None means the one the checkpoint names or has
            beside it (nanoGPT's ``meta.pkl``), else GPT-2's.

    Raises:
        CheckpointError: missing, foreign, damaged or unsafe files, weights that the machine has no
            memory for, or a tokenizer with more ids than the model has embeddings.
    """
    path = locate(source)
    stored = read_folder(path) if path.is_dir() else read_nanogpt(path)
    model, ids = build_model(stored, dtype=dtype), stored.config.vocab_size
    chosen = stored.tokenizer if tokenizer is None else tokenizer
    encoding = load_tokenizer(chosen, vocab_size=ids)
    if encoding.n_vocab > ids:
        raise CheckpointError(
            f"the tokenizer {cut(repr(encoding.name))} has {encoding.n_vocab} ids but {path} only"
            f" {ids} embeddings: name the model's own tokenizer, such as the"
            f" {NANOGPT_TOKENIZER} of its data"
        )
    model = model.to(device=device, dtype=dtype).eval()
    return Checkpoint(model, encoding, with_revision(source, path), stored.trained_passes)


def locate(source: str | Path) -> Path:
    """Where the files of ``source`` lie; a hub name is downloaded (or found in its local cache).

    Raises:
        CheckpointError: there is no such file or folder, and it is no name that can be downloaded.
    """
    if str(source) in BUNDLED:
        with resources.as_file(resources.files("stateful_gpt") / "assets" / str(source)) as path:
            if not (path / WEIGHTS).exists():
                raise CheckpointError(f"the model {cut(source)} is not part of this installation")
            return path
    path = Path(source)
    try:
        if path.is_dir() and not (path / CONFIG).exists() and (path / NANOGPT_WEIGHTS).exists():
            return path / NANOGPT_WEIGHTS
        if path.exists():
            return path
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise CheckpointError(
            f"there is no model file or folder {cut(repr(str(source)))} ({cut(error)})"
        ) from None
    return download(str(source), (CONFIG, WEIGHTS), extra="hub")


def download(name: str, files: Sequence[str], *, extra: str) -> Path:
    """The folder of a model on the hub, or of its local cache; ``files`` are patterns.

    Raises:
        CheckpointError: the hub has none or cannot be reached; ``extra`` is what to install for it.
    """
    missing = f"there is no model file or folder {cut(repr(name))}"
    if Path(name).suffix in (".pt", ".safetensors", ".bin") or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(missing)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{missing}, and downloading it from the hub needs huggingface_hub:"
            f" pip install 'stateful_gpt[{extra}]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises many kinds, most of them its own
        raise CheckpointError(
            f"{missing}, and it could not be downloaded from the hub ({type(error).__name__}):"
            " check the name and the network, or give a local folder"
        ) from None


def with_revision(source: str | Path, found: Path) -> str:
    """``NAME@REVISION`` of what was found in the hub's cache, else the source as it is."""
    cached = found.parent.name == "snapshots" and found != Path(source)
    return f"{source}@{found.name}" if cached else str(source)


def fingerprint(source: str | Path) -> str:
    """A hash of the weights and settings of a model, whatever its files are called.

    Raises:
        CheckpointError: there is no such model, or a part of it cannot be read.
    """
    path = locate(source)
    own = [path / name for name in sorted((WEIGHTS, CONFIG, TOKENIZER))]
    digest = hashlib.sha256()
    for file in own if path.is_dir() else [path, path.with_name(NANOGPT_TOKENIZER)]:
        if file.exists():
            with open_regular(file) as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def save_checkpoint(
    model: GPT,
    folder: Path,
    *,
    tokenizer: Tokenizer | str,
    dtype: torch.dtype = torch.float32,
    trained_passes: int | None = None,
) -> None:
    """Write a model as this project's folder: weights, settings and tokenizer.

    Args:
        tokenizer: an encoding, which is saved too, or the name ``gpt2`` or ``byte``.
        dtype: the stored precision.
        trained_passes: of a model with hidden-state feedback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    if model.tied:
        del state["lm_head.weight"]
    if isinstance(tokenizer, str):
        tokenizer_name = tokenizer
    else:
        assert isinstance(tokenizer, (BytePairs, Characters)), "others have no file of ours"
        tokenizer_name = TOKENIZER
        save_tokenizer(tokenizer, folder / TOKENIZER)
    config: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": tokenizer_name,
        "architecture": asdict(replace(model.config, dropout=0.0)),
    }
    if trained_passes is not None:
        config["trained_passes"] = trained_passes
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    partial = folder / (WEIGHTS + ".partial")
    # through bytes: save_file makes a file that only its owner can read
    partial.write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}))
    os.replace(partial, folder / WEIGHTS)
