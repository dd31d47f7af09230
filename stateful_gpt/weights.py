"""Files of models, of unknown origin: what is allowed in them, and a model made of them.

Each file is checked once, here, and refused by a :class:`CheckpointError`. Nothing is allocated
that its own size does not account for.
"""

import math
import os
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stateful_gpt.console import cut, exhausted
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.tokenizer import has_other_words
from stateful_gpt.untrusted import (
    SETTINGS_SIZE,
    CheckpointError,
    open_regular,
    parse_json,
    read_regular,
    require_memory,
)

FORMAT = "stateful_gpt.model/1"
WEIGHTS = "model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"  # of weights in several files
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
NANOGPT_TOKENIZER = "meta.pkl"

# matrices that GPT-2 as published stores transposed, as (in, out)
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# what a GPT-2 as published may state, the default first
PUBLISHED: dict[str, tuple[object, ...]] = {
    "activation_function": tuple(_ACTIVATIONS),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
MASK_BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # of torch.compile and of DDP
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Stored:
    """What the files of a model hold."""

    file: Path  # of its weights
    state: dict[str, Tensor]
    config: GPTConfig
    tokenizer: str | Path | None  # None: one of its own, which only transformers reads
    trained_passes: int | None = None


def read_folder(folder: Path) -> Stored:
    """A folder of this project, or of a GPT-2 as published."""
    file, weights = folder / CONFIG, folder / WEIGHTS
    if not file.exists():
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG}")
    raw = read_regular(file, most=SETTINGS_SIZE)
    try:
        settings = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON of settings: {cut(error)}") from None
    is_own, family = settings.get("format") == FORMAT, settings.get("model_type")
    if not is_own and family != "gpt2":
        hint = f"; model=hugging_face reads {cut(repr(family))}" if family is not None else ""
        raise CheckpointError(
            f"{file} describes neither a model of this project (format {FORMAT!r})"
            f" nor a GPT-2 (model_type 'gpt2'){hint}"
        )
    if not weights.exists():
        why = f"no {WEIGHTS} (weights in other formats, pickles above all, are not read)"
        if (folder / SHARDS).exists():
            why = "its weights in several files: model=hugging_face reads them"
        raise CheckpointError(f"{folder} has {why}")
    open_regular(weights).close()
    try:
        state = load_file(weights)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        if exhausted(error):
            raise MemoryError from None
        raise CheckpointError(
            f"{weights} is damaged or not a safetensors file: {cut(error)}"
        ) from None
    return (_own_format if is_own else _published_gpt2)(file, settings, weights, state)


def _own_format(
    file: Path, settings: dict[str, Any], weights: Path, state: dict[str, Tensor]
) -> Stored:
    architecture: Any = settings.get("architecture")
    tokenizer, passes = settings.get("tokenizer"), settings.get("trained_passes")
    whole = passes is None or (type(passes) is int and passes >= 1)
    allowed = ("gpt2", "byte", TOKENIZER)
    _require(file, "architecture", architecture, isinstance(architecture, dict), "a table")
    _require(file, "tokenizer", tokenizer, tokenizer in allowed, " or ".join(allowed))
    _require(file, "trained_passes", passes, whole, "a whole number of at least 1")
    named = file.with_name(TOKENIZER) if tokenizer == TOKENIZER else tokenizer
    return Stored(weights, state, _config(file, **architecture), named, passes)


def _published_gpt2(
    file: Path, settings: dict[str, Any], weights: Path, state: dict[str, Tensor]
) -> Stored:
    values = {key: settings.get(key, allowed[0]) for key, allowed in PUBLISHED.items()}
    for key, allowed in PUBLISHED.items():
        said = " or ".join(map(str, allowed)) + " (model=hugging_face reads others)"
        _require(file, key, values[key], values[key] in allowed, said)
    config = _config(
        file,
        block_size=settings.get("n_positions"),
        **{name: settings.get(name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        activation=_ACTIVATIONS[values["activation_function"]],
    )
    inner = settings.get("n_inner")
    _require(file, "n_inner", inner, inner in (None, 4 * config.n_embd), "4 * n_embd")
    renamed = {}
    for name, tensor in state.items():
        prefix = "" if name.startswith(("transformer.", "lm_head.")) else "transformer."
        transposed = name.endswith(_TRANSPOSED) and tensor.ndim == 2
        renamed[prefix + name] = tensor.t() if transposed else tensor
    tied = settings.get("tie_word_embeddings", True)
    whole = bool(tied) or "lm_head.weight" in renamed
    _require(file, "tie_word_embeddings", tied, whole, "true where lm_head.weight is missing")
    return Stored(weights, renamed, config, None if has_other_words(file.parent) else "gpt2")


def _require(file: Path, key: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise CheckpointError(f"{file}: {key} must be {allowed}, got {cut(repr(value))}")


def _config(file: Path, /, **settings: Any) -> GPTConfig:
    try:
        return GPTConfig(**settings)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {cut(error)}") from None


def read_nanogpt(path: Path) -> Stored:
    """nanoGPT's ``ckpt.pt``, with the ``meta.pkl`` beside it, if there is one."""
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"name the folder that holds {path.name} and its {CONFIG}, not {path}"
        )
    with open_regular(path) as stream:
        try:
            _check_archive(stream)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pickle's unusual protocol: refused or fine
                content = torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{path} is not a checkpoint of plain weights: it is damaged or asks to run code,"
                " and was not opened further"
            ) from None
        except Exception as error:  # torch raises many kinds on damaged archives
            if exhausted(error):
                raise
            raise CheckpointError(
                f"{path} is damaged or not a PyTorch checkpoint: {cut(error)}"
            ) from None
    found = content if isinstance(content, dict) else {}
    arguments, state = found.get("model_args"), found.get("model")
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path} is not nanoGPT's: it lacks the tables model and model_args")
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    sizes = {name: arguments.get(name) for name in names}
    config = _config(path, **sizes, bias=arguments.get("bias", True))
    state = {_WRAPPERS.sub("", str(name)): tensor for name, tensor in state.items()}
    beside = path.with_name(NANOGPT_TOKENIZER)
    return Stored(path, state, config, beside if beside.exists() else "gpt2")


def _check_archive(stream: BinaryIO) -> None:
    """Refuse what takes more memory to read than the file has bytes."""
    size = os.fstat(stream.fileno()).st_size
    with zipfile.ZipFile(stream) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > size:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, but has only {size:,}")
        for name in archive.namelist():
            # the one type that a pickle of weights may call with a size of its own
            if name.endswith("/data.pkl") and b"bytearray" in archive.read(name):
                raise pickle.UnpicklingError
    stream.seek(0)


def build_model(stored: Stored, *, dtype: torch.dtype) -> GPT:
    """A model with these weights, each name and shape of which must be the expected one."""
    state = {name: one for name, one in stored.state.items() if not MASK_BUFFER.search(name)}
    _check_sizes(state, stored.config, stored.file, dtype=dtype)
    head, embedding = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    tied = head is None or (embedding is not None and torch.equal(head, embedding))
    with _Unfilled():
        model = GPT(stored.config, tied=tied)
    if tied and embedding is not None:
        state["lm_head.weight"] = embedding
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        if exhausted(error):
            raise
        said = str(error).removeprefix("Error(s) in loading state_dict for GPT:")
        raise CheckpointError(f"{cut(stored.file)}: {cut(said)}") from None
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model


class _Unfilled(TorchFunctionMode):
    """No initial weights; the meta device would do, but takes seconds to import a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def _check_sizes(
    state: dict[str, Tensor], config: GPTConfig, file: Path, *, dtype: torch.dtype
) -> None:
    """Refuse what is no plain weight, and sizes that the file belies, before anything is made."""
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided
        if not dense or tensor.is_nested or tensor.is_meta or tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{file}: {cut(repr(name))} is not a dense tensor of floating-point numbers"
            )
    held = sum(tensor.numel() for tensor in state.values())
    stored = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    size = file.stat().st_size
    L, C, rows = config.n_layer, config.n_embd, config.vocab_size + config.block_size
    stated = rows * C + 12 * L * C * C if max(L, C, rows) < 2**40 else math.inf
    problem = None
    if stored > 2 * size:  # a tied weight may be named twice
        problem = f"its weights would take {stored:,} bytes, but it has only {size:,}"
    elif len(state) < L or stated > 2 * held:  # a little off is said by the name that is wrong
        problem = f"the sizes it states take {L:.3g} layers and {stated:,} weights; it has {held:,}"
    if problem is not None:
        raise CheckpointError(f"{file}: {problem}")
    require_memory(held * dtype.itemsize, f"{file}: it needs")
