"""Load and save models: this project's folders, nanoGPT's ckpt.pt, published GPT-2 folders.

Files are untrusted: nothing in them is executed, every name and shape is checked, and whatever is
wrong with one is a :class:`CheckpointError` whose message is one sentence.
"""

import hashlib
import json
import os
import pickle
import re
import warnings
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.tokenizer import TokenizerError, load_tokenizer, save_bpe

FORMAT = "stateful_gpt.model/1"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
BUNDLED = ("bundled", "bundled_stateful")

State = dict[str, Tensor]

# matrices that GPT-2 as published stores transposed, as (in, out)
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASK_BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


class CheckpointError(ValueError):
    """A model that cannot be loaded; the message is one sentence for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to run, and the tokenizer that its ids belong to.

    ``trained_passes`` is the number of passes a model with hidden-state feedback was trained in,
    where its folder says so.
    """

    model: GPT
    tokenizer: tiktoken.Encoding
    source: str
    trained_passes: int | None = None


def load_checkpoint(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Checkpoint:
    """Load a model in evaluation mode.

    Args:
        source: ``bundled``; a folder of this project or of a published GPT-2 (``config.json`` and
            ``model.safetensors``); nanoGPT's ``ckpt.pt``; or a hub name such as ``gpt2``, which
            needs a network.
        tokenizer: ``gpt2``, ``byte`` or a file. None means the one the checkpoint names, or
            GPT-2's where the format names none.

    Raises:
        CheckpointError: missing, foreign, damaged or unsafe files, or a tokenizer with more ids
            than the model has embeddings.
    """
    path = locate(source)
    passes: int | None = None
    if path.is_dir():
        state, config, named_tokenizer, passes = _read_folder(path)
    else:
        state, config = _read_nanogpt(path)
        named_tokenizer = "gpt2"
    model = _build(state, config, path)
    try:
        encoding = load_tokenizer(tokenizer if tokenizer is not None else named_tokenizer)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from None
    if encoding.n_vocab > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer {encoding.name!r} has {encoding.n_vocab} ids but {path} only"
            f" {config.vocab_size} embeddings: name the model's own tokenizer"
        )
    model = model.to(device=device, dtype=dtype).eval()
    return Checkpoint(model=model, tokenizer=encoding, source=str(source), trained_passes=passes)


def locate(source: str | Path) -> Path:
    """Where the files of ``source`` lie; a hub name is downloaded (or found in its local cache).

    Raises:
        CheckpointError: there is no such file or folder, and it is no name that can be downloaded.
    """
    if str(source) in BUNDLED:
        with resources.as_file(resources.files("stateful_gpt") / "assets" / str(source)) as path:
            if not (path / WEIGHTS).exists():
                raise CheckpointError(f"the model {source!r} is not part of this installation")
            return path
    path = Path(source)
    try:
        if path.is_dir() or path.is_file():
            return path
    except OSError as error:  # a name that no file system takes
        raise CheckpointError(
            f"there is no model file or folder {str(source)[:80]!r} ({error.strerror})"
        ) from None
    looks_local = path.is_absolute() or path.suffix in (".pt", ".safetensors", ".bin")
    if looks_local or not _HUB_NAME.fullmatch(str(source)):
        raise CheckpointError(f"there is no model file or folder {str(source)!r}")
    return _download(str(source))


def fingerprint(source: str | Path) -> str:
    """A hash of the weights and settings of a model, whatever its files are called."""
    path = locate(source)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.name in (WEIGHTS, CONFIG, TOKENIZER) or file == path:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def save_checkpoint(
    model: GPT,
    folder: Path,
    *,
    tokenizer: tiktoken.Encoding | str,
    dtype: torch.dtype = torch.float32,
    trained_passes: int | None = None,
) -> None:
    """Write a model as this project's folder: weights, settings and tokenizer.

    Args:
        tokenizer: a trained encoding, which is saved too, or the name ``gpt2`` or ``byte``.
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
        tokenizer_name = TOKENIZER
        save_bpe(tokenizer, folder / TOKENIZER)
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


def _read_folder(folder: Path) -> tuple[State, GPTConfig, str | Path, int | None]:
    try:
        settings = json.loads((folder / CONFIG).read_bytes())
    except OSError:
        raise CheckpointError(
            f"{folder} is not a model folder: it has no readable {CONFIG}"
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{folder / CONFIG} is not JSON") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{folder / CONFIG} is not a table of settings")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} (weights in other formats, pickles above all, are not read)"
        )
    try:
        state = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{weights} is damaged or not a safetensors file: {error}") from None
    if settings.get("format") == FORMAT:
        passes = settings.get("trained_passes")
        if passes is not None and (type(passes) is not int or passes < 1):
            raise CheckpointError(
                f"{folder / CONFIG}: trained_passes must be a whole number of at least 1,"
                f" got {passes!r}"
            )
        return *_own_format(folder, settings, state), passes
    if settings.get("model_type") == "gpt2":
        return *_published_gpt2(folder, settings, state), None
    raise CheckpointError(
        f"{folder / CONFIG} describes neither a model of this project (format {FORMAT!r})"
        f" nor a GPT-2 (model_type 'gpt2')"
    )


def _own_format(
    folder: Path, settings: dict[str, Any], state: State
) -> tuple[State, GPTConfig, str | Path]:
    architecture = settings.get("architecture")
    known = {field.name for field in fields(GPTConfig)}
    if not isinstance(architecture, dict) or not set(architecture) <= known:
        raise CheckpointError(f"{folder / CONFIG} has no architecture with known settings")
    try:
        config = GPTConfig(**architecture)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    name = settings.get("tokenizer")
    if name in ("gpt2", "byte"):
        return state, config, str(name)
    if name != TOKENIZER:
        raise CheckpointError(
            f"{folder / CONFIG}: tokenizer must be gpt2, byte or {TOKENIZER}, got {name!r}"
        )
    return state, config, folder / TOKENIZER


def _published_gpt2(
    folder: Path, settings: dict[str, Any], state: State
) -> tuple[State, GPTConfig, str | Path]:
    expected = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise CheckpointError(
                f"{folder / CONFIG}: {key} must be {value}, got {settings[key]!r}"
            )
    activation = settings.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _GPT2_ACTIVATIONS:
        raise CheckpointError(
            f"{folder / CONFIG}: activation_function must be one of"
            f" {', '.join(_GPT2_ACTIVATIONS)}, got {activation!r}"
        )
    try:
        config = GPTConfig(
            block_size=settings["n_positions"],
            vocab_size=settings["vocab_size"],
            n_layer=settings["n_layer"],
            n_head=settings["n_head"],
            n_embd=settings["n_embd"],
            activation=_GPT2_ACTIVATIONS[activation],
        )
    except KeyError as error:
        raise CheckpointError(f"{folder / CONFIG} lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    if settings.get("n_inner") not in (None, 4 * config.n_embd):
        raise CheckpointError(
            f"{folder / CONFIG}: n_inner must be 4 * n_embd, got {settings['n_inner']!r}"
        )
    renamed: State = {}
    for name, tensor in state.items():
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        if name.endswith(_TRANSPOSED) and tensor.ndim == 2:
            tensor = tensor.t()
        renamed[name] = tensor
    return renamed, config, "gpt2"


def _read_nanogpt(path: Path) -> tuple[State, GPTConfig]:
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"name the folder that holds {path.name} and its {CONFIG}, not {path}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's unusual protocol: refused or fine
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is not a checkpoint of plain weights: it is damaged or asks to run code,"
            " and was not opened further"
        ) from None
    except Exception as error:  # torch raises many kinds on damaged archives
        detail = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint: {detail}") from None
    if not isinstance(content, dict) or not {"model", "model_args"} <= set(content):
        raise CheckpointError(f"{path} is not nanoGPT's: it lacks model and model_args")
    arguments, state = content["model_args"], content["model"]
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path} is not nanoGPT's: model and model_args must be tables")
    shape_names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    missing = [name for name in shape_names if arguments.get(name) is None]
    if missing:
        raise CheckpointError(f"{path}: model_args lacks {', '.join(missing)}")
    try:
        config = GPTConfig(
            **{name: arguments[name] for name in shape_names},
            bias=bool(arguments.get("bias", True)),
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return {str(k).removeprefix("_orig_mod."): v for k, v in state.items()}, config


def _build(state: State, config: GPTConfig, path: Path) -> GPT:
    """A model with these weights, each name and shape of which must be the expected one."""
    state = {name: tensor for name, tensor in state.items() if not _MASK_BUFFER.search(name)}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is not a tensor of floating-point numbers")
    head, embedding = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    tied = head is None or (embedding is not None and torch.equal(head, embedding))
    _check_sizes(state, config, path)
    with torch.device("meta"):
        model = GPT(config, tied=tied)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied and embedding is not None:
        state["lm_head.weight"] = embedding
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{path} lacks the weights {name}")
        if name not in expected:
            raise CheckpointError(f"{path} has weights {name!r} that the architecture does not")
        if expected[name] != found[name]:
            raise CheckpointError(
                f"{path}: {name} must have shape {expected[name]}, got {found[name]}"
            )
    model.load_state_dict(state, assign=True)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def _check_sizes(state: State, config: GPTConfig, path: Path) -> None:
    """Refuse sizes that the weights contradict, before a model of those sizes is built."""
    claims = {
        "transformer.wte.weight": (config.vocab_size, config.n_embd),
        "transformer.wpe.weight": (config.block_size, config.n_embd),
    }
    for name, shape in claims.items():
        if name not in state:
            raise CheckpointError(f"{path} lacks the weights {name}")
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"{path}: {name} must have shape {shape}, got {tuple(state[name].shape)}"
            )
    if f"transformer.h.{config.n_layer - 1}.ln_1.weight" not in state:
        raise CheckpointError(f"{path} lacks the weights of layer {config.n_layer - 1}")


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"there is no model file or folder {name!r}, and downloading it from the hub needs"
            " huggingface_hub: pip install 'stateful_gpt[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub's client raises many kinds, most of them its own
        reason = type(error).__name__
        raise CheckpointError(
            f"there is no model file or folder {name!r}, and it could not be downloaded from the"
            f" hub ({reason}): check the name and the network, or give a local folder"
        ) from None
