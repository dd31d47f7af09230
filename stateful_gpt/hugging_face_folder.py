"""Find, fingerprint and load the folder of a Hugging Face model, or its name on the hub."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stateful_gpt.checkpoint import Checkpoint, CheckpointError, download, with_revision
from stateful_gpt.console import cut, exhausted
from stateful_gpt.hugging_face import HuggingFaceModel, named, quiet
from stateful_gpt.hugging_face_tokenizer import HuggingFaceTokenizer
from stateful_gpt.tokenizer import load_tokenizer

FILES = ("*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt")  # all that is read
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# names that stand for a folder, and the command that makes it
PREPARED = {"smollm2": (Path("data/models/smollm2"), "python -m scripts.prepare_smollm2")}


def load_hugging_face(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Checkpoint[HuggingFaceModel]:
    """Load a causal model of transformers in evaluation mode.

    Args:
        source: a folder with ``config.json`` and (sharded) safetensors, ``smollm2``, or a name on
            the hub, which needs a network. No pickles are read, and no code that comes with a model
            is run.
        tokenizer: ``gpt2``, ``byte`` or a file, instead of the model's own.

    Raises:
        CheckpointError: what cannot be found, loaded or studied, in one sentence.
    """
    folder = locate(source)
    model = _read_model(folder, dtype).to(device)
    adapter = HuggingFaceModel(model)
    encoding = load_tokenizer(tokenizer) if tokenizer else _own_tokenizer(folder, model)
    largest = encoding.n_vocab - 1
    if isinstance(encoding, HuggingFaceTokenizer):
        # special tokens may lie beyond the embeddings: no text has them
        largest = max(encoding.used)
    if largest >= adapter.vocab_size:
        raise CheckpointError(
            f"the tokenizer {cut(repr(encoding.name))} uses the id {largest}, but {folder} has"
            f" only {adapter.vocab_size} embeddings"
        )
    return Checkpoint(adapter, encoding, with_revision(source, folder))


def locate(source: str | Path) -> Path:
    """The folder of ``source``; a name on the hub is downloaded (or found in its local cache).

    Raises:
        CheckpointError: there is no such folder, and it is no name that can be downloaded.
    """
    path, command = PREPARED.get(Path(source).name, (Path(source), None))
    path = path if str(source) in PREPARED else Path(source)
    try:
        exists = path.exists()
    except OSError as error:  # a name that no file system takes
        raise CheckpointError(
            f"there is no model folder {cut(repr(str(source)))} ({error.strerror})"
        ) from None
    if exists and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} must be a folder with config.json and safetensors: it has no config.json"
        )
    if not exists and command is not None:
        raise CheckpointError(f"there is no model folder {path}: make it with {command}")
    return path if exists else download(str(source), FILES, extra="hugging_face")


def fingerprint(source: str | Path) -> str:
    """A hash of the weights, settings and tokenizer of a model."""
    folder, digest = locate(source), hashlib.sha256()
    for file in sorted({file for pattern in FILES for file in folder.glob(pattern)}):
        about = file.stat()
        digest.update(f"{file.name} {_hash(file, about.st_size, about.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


@cache
def _hash(file: Path, size: int, changed: int) -> str:
    """Of gigabytes, so it is computed once while size and time of change stay what they are."""
    with file.open("rb") as stream:
        return f"{size} {hashlib.file_digest(stream, 'sha256').hexdigest()}"


def _read_model(folder: Path, dtype: torch.dtype) -> Any:
    """The causal model in a folder; its weights must be those of its architecture."""
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has no safetensors (weights in other formats, pickles above all, are not"
            " read)"
        )
    wide = dtype == torch.float64
    model, found = _load(
        "AutoModelForCausalLM",
        folder,
        # float64 by way of float32: what is computed when a model is made is the same then
        dtype=torch.float32 if wide else dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are refused below
        output_loading_info=True,
    )
    version = _transformers().__version__
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
    if rotary and int(version.split(".")[0]) < 5:
        raise CheckpointError(
            f"{folder} was written by transformers 5, whose rotary settings {version} would pass"
            " over: load it with transformers 5"
        )
    kinds = {"missing": "missing", "unexpected": "unexpected", "mismatched": "of another shape"}
    for kind, what in kinds.items():
        for key in sorted(found[f"{kind}_keys"], key=str)[:1]:
            name = key if isinstance(key, str) else key[0]  # with both shapes
            raise CheckpointError(
                f"the weights in {folder} are not those of its architecture: {name} is {what}"
            )
    return model.double() if wide else model


def _own_tokenizer(folder: Path, model: Any) -> Any:
    """The tokenizer in a folder; GPT-2's own for a GPT-2 that comes without one."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if model.config.model_type == "gpt2":
            return load_tokenizer("gpt2")
        raise CheckpointError(f"{folder} has no tokenizer: name one (gpt2, byte or a file)")
    found = _load("AutoTokenizer", folder, use_fast=True)
    if not hasattr(found, "backend_tokenizer"):
        raise CheckpointError(f"the tokenizer in {folder} has no fast form (tokenizer.json)")
    ends: set[int] = set()
    for holder in (found, model.config.get_text_config(), model.generation_config):
        ids = getattr(holder, "eos_token_id", None)
        ends.update([ids] if isinstance(ids, int) else ids or ())
    return HuggingFaceTokenizer(found.backend_tokenizer, name=folder.name, end_tokens=sorted(ends))


def _load(kind: str, folder: Path, **options: Any) -> Any:
    """What transformers makes of a folder, without a network and without code that lies in it."""
    maker = getattr(_transformers(), kind)
    with quiet():
        try:
            return maker.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, **options
            )
        except Exception as error:  # of many kinds, most of them of transformers' own
            if exhausted(error):
                raise
            what = "causal model" if kind == "AutoModelForCausalLM" else "tokenizer"
            raise CheckpointError(
                f"{folder} is not a {what} that transformers loads: {named(error)}"
            ) from None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            "models of Hugging Face need transformers: pip install 'stateful_gpt[hugging_face]'"
        ) from None
    return transformers
