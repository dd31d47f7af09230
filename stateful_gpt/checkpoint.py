"""Load and save models: this project's folders, nanoGPT's, GPT-2's, and any of transformers.

Files are untrusted: nothing in them is executed, every name and shape is checked, and whatever is
wrong with one is a :class:`CheckpointError` whose message is one sentence.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from safetensors.torch import save

from stateful_gpt.console import cut
from stateful_gpt.hugging_face_folder import FILES, read_hugging_face
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.model import GPT
from stateful_gpt.tokenizer import (
    STATING_FILES,
    BytePairs,
    Characters,
    Tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
    has_other_words,
    load_tokenizer,
    save_tokenizer,
)
from stateful_gpt.untrusted import SETTINGS_SIZE, open_regular, parse_json, read_regular
from stateful_gpt.untrusted import CheckpointError as CheckpointError
from stateful_gpt.weights import (
    CONFIG,
    FORMAT,
    NANOGPT_TOKENIZER,
    PUBLISHED,
    SHARDS,
    TOKENIZER,
    WEIGHTS,
    build_model,
    read_folder,
    read_nanogpt,
)

NANOGPT_WEIGHTS = "ckpt.pt"
ADAPTER = "adapter_config.json"  # of peft, which would change the model beside it
BUNDLED = ("bundled", "bundled_stateful")
# names that stand for a folder of transformers, and the command that makes it
PREPARED = {"smollm2": (Path("data/models/smollm2"), "python -m scripts.prepare_smollm2")}

HUB_CACHE = "snapshots"  # the folder of it that holds models
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

Library = Literal["stateful_gpt", "transformers"]  # what reads a model
Model = TypeVar("Model", bound=LanguageModel, covariant=True)


@dataclass(frozen=True)
class Checkpoint(Generic[Model]):
    """A model ready to run, and the tokenizer that its ids belong to."""

    model: Model
    tokenizer: Tokenizer
    source: str  # what was asked for; of a name on the hub it is NAME@REVISION
    trained_passes: int | None = None  # of a model with hidden-state feedback, where it is known


def load_model(
    source: str | Path,
    *,
    library: Library | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Checkpoint[LanguageModel]:
    """What ``load_checkpoint`` loads, or a causal model of transformers; raises as it does.

    Args:
        source: for transformers a folder with ``config.json`` and (sharded) safetensors,
            ``smollm2``, or a name on the hub. No code that comes with a model is run.
        library: what reads it; None: this one where it can, transformers else.
        tokenizer: ``gpt2``, ``byte`` or a file, instead of the model's own.
    """
    if (library or library_of(source)) == "stateful_gpt":
        return load_checkpoint(source, tokenizer=tokenizer, dtype=dtype, device=device)
    folder = locate(source, "transformers")
    model, encoding = read_hugging_face(folder, tokenizer, dtype=dtype, device=device)
    return Checkpoint(model, encoding, _with_revision(source, folder))


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
            beside it (nanoGPT's ``meta.pkl``), else GPT-2's, unless a GPT-2 has other words.

    Raises:
        CheckpointError: missing, foreign, damaged or unsafe files, weights that the machine has no
            memory for, or a tokenizer with more ids than the model has embeddings.
    """
    path = locate(source)
    stored = read_folder(path) if path.is_dir() else read_nanogpt(path)
    chosen = stored.tokenizer if tokenizer is None else tokenizer
    if chosen is None:
        raise CheckpointError(
            f"{path} has a tokenizer whose words, start or end are not GPT-2's: model=hugging_face"
            " reads it, and model.tokenizer=gpt2 reads GPT-2's all the same"
        )
    model, ids = build_model(stored, dtype=dtype), stored.config.vocab_size
    encoding = load_tokenizer(chosen, vocab_size=ids)
    if encoding.n_vocab > ids:
        raise CheckpointError(
            f"the tokenizer {cut(repr(encoding.name))} has {encoding.n_vocab} ids but {path} only"
            f" {ids} embeddings: name the model's own by model.tokenizer or --tokenizer, such as"
            f" the {NANOGPT_TOKENIZER} of its data"
        )
    model = model.to(device=device, dtype=dtype).eval()
    return Checkpoint(model, encoding, _with_revision(source, path), stored.trained_passes)


def library_of(source: str | Path) -> Library:
    """This one for formats of its own, nanoGPT's or GPT-2's, and for no model, which it refuses."""
    if str(source) in BUNDLED:
        return "stateful_gpt"
    if str(source) in PREPARED:
        return "transformers"
    path = Path(source)
    try:
        files = (SHARDS, *STATING_FILES)
        folder = path if path.exists() else _download(str(source), files, extra="hub")
        settings = parse_json(read_regular(folder / CONFIG, most=SETTINGS_SIZE))
    except (OSError, ValueError):
        return "stateful_gpt"
    if settings.get("model_type") == "gpt2":
        other = any(settings.get(key, some[0]) not in some for key, some in PUBLISHED.items())
        other = other or (folder / SHARDS).exists() or has_other_words(folder)
        return "transformers" if other else "stateful_gpt"
    return "transformers" if "model_type" in settings else "stateful_gpt"


def locate(source: str | Path, library: Library = "stateful_gpt") -> Path:
    """Where the files of ``source`` lie; a hub name is downloaded (or found in its local cache)."""
    name, path, ours = str(source), Path(source), library == "stateful_gpt"
    if ours and name in BUNDLED:
        with resources.as_file(resources.files("stateful_gpt") / "assets" / name) as path:
            if not (path / WEIGHTS).exists():
                raise CheckpointError(f"the model {name} is not part of this installation")
            return path
    if not ours and name in PREPARED:
        path = PREPARED[name][0]
    try:
        exists = (path / CONFIG).exists() or path.exists()
    except OSError as error:  # a name that no file system takes, or a folder that is not ours
        raise CheckpointError(
            f"there is no model file or folder {cut(repr(name))} ({error.strerror})"
        ) from None
    if not exists and not ours and path.name in PREPARED:
        raise CheckpointError(
            f"there is no model folder {path}: make it with {PREPARED[path.name][1]}"
        )
    if not exists and ours:
        path = _download(name, (WEIGHTS, SHARDS, *STATING_FILES), extra="hub")
    elif not exists:
        path = _download(name, FILES, extra="hugging_face")
    if (path / ADAPTER).exists():
        raise CheckpointError(
            f"{path} holds an adapter ({ADAPTER}): merge it into its model with peft, and name the"
            " folder in which that is saved"
        )
    if (path / CONFIG).is_file():
        return path
    if not ours:
        raise CheckpointError(
            f"{path} must be a folder with config.json and safetensors: it has no config.json"
        )
    of_nanogpt = path / NANOGPT_WEIGHTS
    return of_nanogpt if of_nanogpt.exists() else path


def _download(name: str, files: Sequence[str], *, extra: str) -> Path:
    """The folder of a model on the hub; ``files`` are patterns, ``extra`` is what to install."""
    missing = f"there is no model file or folder {cut(repr(name))}"
    if Path(name).suffix in (".pt", ".safetensors", ".bin") or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(missing)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{missing}, and downloading it from the hub needs huggingface_hub:"
            f" pip install -e '.[{extra}]' -c constraints.txt"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises many kinds, most of them its own
        raise CheckpointError(
            f"{missing}, and it could not be downloaded from the hub ({type(error).__name__}):"
            " check the name, the network and, if the model is gated, your login, or give a local"
            " folder"
        ) from None


def _with_revision(source: str | Path, found: Path) -> str:
    """``NAME@REVISION`` of what was found in the hub's cache, else the source as it is."""
    cached = found.parent.name == HUB_CACHE and found != Path(source)
    return f"{source}@{found.name}" if cached else str(source)


def fingerprint(source: str | Path, *, library: Library | None = None) -> str:
    """A hash of the weights, settings and tokenizer of a model; arguments as of ``load_model``."""
    library, digest = library or library_of(source), hashlib.sha256()
    path = locate(source, library)
    if library == "transformers":
        for file in sorted({f for pattern in FILES for f in path.glob(pattern)}):
            digest.update(f"{file.name} {file.stat().st_size} {_hash(file).hex()}\n".encode())
        return digest.hexdigest()[:16]
    own = [path / name for name in sorted((WEIGHTS, CONFIG, TOKENIZER))]
    if path.parent.name == HUB_CACHE and not has_other_words(path):
        own.remove(path / TOKENIZER)  # GPT-2's, downloaded to see that it is
    for file in own if path.is_dir() else [path, path.with_name(NANOGPT_TOKENIZER)]:
        if file.exists():  # whatever it is called
            digest.update(_hash(file))
    return digest.hexdigest()[:16]


def _hash(file: Path) -> bytes:
    about = file.stat()
    return _hash_of_version(file, about.st_ino, about.st_size, about.st_mtime_ns)


@cache
def _hash_of_version(file: Path, *_version: int) -> bytes:
    """Of gigabytes, for which not every run of a sweep should wait."""
    with open_regular(file, most=sys.maxsize) as stream:  # a part at a time
        return hashlib.file_digest(stream, "sha256").digest()


def save_checkpoint(
    model: GPT,
    folder: Path,
    *,
    tokenizer: Tokenizer | str,
    dtype: torch.dtype = torch.float32,
    trained_passes: int | None = None,
) -> None:
    """Write a model as this project's folder: weights in ``dtype``, settings and tokenizer.

    ``tokenizer`` is ``gpt2``, ``byte`` or an encoding; any but those two is saved too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    if model.tied:
        del state["lm_head.weight"]
    shipped = (gpt2_tokenizer(), byte_tokenizer(ends=True), byte_tokenizer(ends=False))
    if isinstance(tokenizer, str):
        tokenizer_name = tokenizer
    elif tokenizer in shipped:  # a trained one may have such a name, too
        tokenizer_name = tokenizer.name
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
