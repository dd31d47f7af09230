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
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from stateful_gpt.console import cut
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.tokenizer import (
    BytePairs,
    Characters,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    save_tokenizer,
)
from stateful_gpt.untrusted import SETTINGS_SIZE, parse_json
from stateful_gpt.weights import CheckpointError as CheckpointError
from stateful_gpt.weights import State, build_model, check_archive, make_config, open_file

FORMAT = "stateful_gpt.model/1"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
NANOGPT_WEIGHTS, NANOGPT_TOKENIZER = "ckpt.pt", "meta.pkl"
BUNDLED = ("bundled", "bundled_stateful")

# matrices that GPT-2 as published stores transposed, as (in, out)
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


Model = TypeVar("Model", bound=LanguageModel, covariant=True)


@dataclass(frozen=True)
class Checkpoint(Generic[Model]):
    """A model ready to run, and the tokenizer that its ids belong to.

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
    passes: int | None = None
    if path.is_dir():
        state, config, named_tokenizer, passes = _read_folder(path)
        size = (path / WEIGHTS).stat().st_size
    else:
        state, config = _read_nanogpt(path)
        size = path.stat().st_size
        beside = path.with_name(NANOGPT_TOKENIZER)
        named_tokenizer = beside if beside.exists() else "gpt2"
    model = build_model(state, config, path, size=size, dtype=dtype)
    chosen = tokenizer if tokenizer is not None else named_tokenizer
    try:
        encoding = load_tokenizer(chosen, vocab_size=config.vocab_size)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from None
    if encoding.n_vocab > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer {encoding.name!r} has {encoding.n_vocab} ids but {path} only"
            f" {config.vocab_size} embeddings: name the model's own tokenizer, such as the"
            f" {NANOGPT_TOKENIZER} of its data"
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
        found = path.exists()
        if path.is_dir() and not (path / CONFIG).exists() and (path / NANOGPT_WEIGHTS).exists():
            return path / NANOGPT_WEIGHTS
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise CheckpointError(
            f"there is no model file or folder {cut(repr(str(source)))} ({cut(error)})"
        ) from None
    if found:
        return path
    looks_local = path.is_absolute() or path.suffix in (".pt", ".safetensors", ".bin")
    if looks_local or not _HUB_NAME.fullmatch(str(source)):
        raise CheckpointError(f"there is no model file or folder {cut(repr(str(source)))}")
    return _download(str(source))


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
            with open_file(file) as stream:
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


def _read_folder(folder: Path) -> tuple[State, GPTConfig, str | Path, int | None]:
    file, weights = folder / CONFIG, folder / WEIGHTS
    if not file.exists():
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG}")
    with open_file(file, most=SETTINGS_SIZE) as stream:
        try:
            settings = parse_json(stream.read())
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {cut(error)}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} is not a table of settings")
    if not weights.exists():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} (weights in other formats, pickles above all, are not read)"
        )
    open_file(weights).close()
    try:
        state = load_file(weights)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{weights} is damaged or not a safetensors file: {cut(error)}"
        ) from None
    if settings.get("format") == FORMAT:
        passes = settings.get("trained_passes")
        if passes is not None and (type(passes) is not int or passes < 1):
            raise CheckpointError(
                f"{file}: trained_passes must be a whole number of at least 1,"
                f" got {cut(repr(passes))}"
            )
        return *_own_format(folder, settings, state), passes
    if settings.get("model_type") == "gpt2":
        return *_published_gpt2(folder, settings, state), None
    raise CheckpointError(
        f"{file} describes neither a model of this project (format {FORMAT!r})"
        f" nor a GPT-2 (model_type 'gpt2')"
    )


def _own_format(
    folder: Path, settings: dict[str, Any], state: State
) -> tuple[State, GPTConfig, str | Path]:
    architecture = settings.get("architecture")
    known = {field.name for field in fields(GPTConfig)}
    if not isinstance(architecture, dict) or not set(architecture) <= known:
        raise CheckpointError(f"{folder / CONFIG} has no architecture with known settings")
    config = make_config(folder / CONFIG, **architecture)
    name = settings.get("tokenizer")
    if name in ("gpt2", "byte"):
        return state, config, str(name)
    if name != TOKENIZER:
        raise CheckpointError(
            f"{folder / CONFIG}: tokenizer must be gpt2, byte or {TOKENIZER}, got {cut(repr(name))}"
        )
    return state, config, folder / TOKENIZER


def _published_gpt2(
    folder: Path, settings: dict[str, Any], state: State
) -> tuple[State, GPTConfig, str | Path]:
    expected = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "add_cross_attention"), False),
    }
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise CheckpointError(
                f"{folder / CONFIG}: {key} must be {value}, got {cut(repr(settings[key]))}"
            )
    activation = settings.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _GPT2_ACTIVATIONS:
        raise CheckpointError(
            f"{folder / CONFIG}: activation_function must be one of"
            f" {', '.join(_GPT2_ACTIVATIONS)}, got {cut(repr(activation))}"
        )
    names = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
    missing = [name for name in names if name not in settings]
    if missing:
        raise CheckpointError(f"{folder / CONFIG} lacks {', '.join(missing)}")
    config = make_config(
        folder / CONFIG,
        block_size=settings["n_positions"],
        **{name: settings[name] for name in names[1:]},
        activation=_GPT2_ACTIVATIONS[activation],
    )
    if settings.get("n_inner") not in (None, 4 * config.n_embd):
        raise CheckpointError(
            f"{folder / CONFIG}: n_inner must be 4 * n_embd, got {cut(repr(settings['n_inner']))}"
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
    with open_file(path) as stream:
        try:
            check_archive(stream)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pickle's unusual protocol: refused or fine
                content = torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{path} is not a checkpoint of plain weights: it is damaged or asks to run code,"
                " and was not opened further"
            ) from None
        except Exception as error:  # torch raises many kinds on damaged archives
            raise CheckpointError(
                f"{path} is damaged or not a PyTorch checkpoint: {cut(error)}"
            ) from None
    if not isinstance(content, dict) or not {"model", "model_args"} <= set(content):
        raise CheckpointError(f"{path} is not nanoGPT's: it lacks model and model_args")
    arguments, state = content["model_args"], content["model"]
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path} is not nanoGPT's: model and model_args must be tables")
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    settings = {name: arguments.get(name) for name in names}
    settings["bias"] = arguments.get("bias", True)
    for name, value in settings.items():
        if not isinstance(value, int):  # a tensor, say, which does not print in one line
            raise CheckpointError(
                f"{path}: {name} of model_args must be a plain number or truth value, got"
                f" {cut(repr(value)) if isinstance(value, str | float) else type(value).__name__}"
            )
    return {str(k).removeprefix("_orig_mod."): v for k, v in state.items()}, make_config(
        path, **settings
    )


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
