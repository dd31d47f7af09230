"""Weights of unknown origin: what is allowed in them, and a model made of them.

Nothing is allocated that the file's own size does not account for.
"""

import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stateful_gpt.console import cut
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.untrusted import machine_memory, open_regular

State = dict[str, Tensor]

_MASK_BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointError(ValueError):
    """A model that cannot be loaded; the message is one sentence for the user."""


def open_file(path: Path, *, most: int | None = None) -> io.BufferedReader:
    """Open a file of a model; whatever is wrong with it is a CheckpointError."""
    try:
        return open_regular(path, most=machine_memory() if most is None else most)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {cut(error.strerror)}") from None


def make_config(file: Path, **settings: Any) -> GPTConfig:
    """The settings that a file states, each of them checked."""
    try:
        return GPTConfig(**settings)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {cut(error)}") from None


def check_archive(stream: BinaryIO) -> None:
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


class _Unfilled(TorchFunctionMode):
    """Makes modules without drawing initial weights for them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def build_model(
    state: State, config: GPTConfig, path: Path, *, size: int, dtype: torch.dtype
) -> GPT:
    """A model with these weights, each name and shape of which must be the expected one."""
    state = {name: tensor for name, tensor in state.items() if not _MASK_BUFFER.search(name)}
    _check_tensors(state, config, path, size=size, dtype=dtype)
    head, embedding = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    tied = head is None or (embedding is not None and torch.equal(head, embedding))
    with _Unfilled():
        model = GPT(config, tied=tied)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied and embedding is not None:
        state["lm_head.weight"] = embedding
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{path} lacks the weights {name}")
        if name not in expected:
            raise CheckpointError(
                f"{path} has weights {cut(repr(name))} that the architecture does not"
            )
        if expected[name] != found[name]:
            raise CheckpointError(
                f"{path}: {name} must have shape {expected[name]}, got {found[name]}"
            )
    model.load_state_dict(state, assign=True)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def _check_tensors(
    state: State, config: GPTConfig, path: Path, *, size: int, dtype: torch.dtype
) -> None:
    """Refuse tensors that are no plain weights, and sizes that the file of ``size`` bytes belies.

    It comes before anything is allocated for them.
    """
    held = needed = 0
    for name, tensor in state.items():
        plain = (
            isinstance(tensor, Tensor)
            and tensor.dtype in _FLOATS
            and tensor.layout is torch.strided
            and not tensor.is_nested
            and tensor.device.type == "cpu"
        )
        if not plain:
            raise CheckpointError(
                f"{path}: {cut(repr(name))} is not a dense tensor of floating-point numbers"
            )
        held += tensor.numel()
        needed += tensor.numel() * tensor.itemsize
    # a tied weight may be named twice
    if needed > 2 * size:
        raise CheckpointError(
            f"{path}: its weights would take {needed:,} bytes, but it has only {size:,}"
        )
    L, C, rows = config.n_layer, config.n_embd, config.vocab_size + config.block_size
    stated = rows * C + 12 * L * C * C if max(L, C, rows) < 2**40 else math.inf
    # a little off is said better by the name or shape that is wrong
    if len(state) < L or stated > 2 * held:
        raise CheckpointError(
            f"{path} states sizes that take {L:.3g} layers and {stated:,} weights, but it lacks"
            f" them: it has {len(state)} tensors of {held:,} weights"
        )
    memory = machine_memory()
    if held * dtype.itemsize > memory:
        raise CheckpointError(
            f"{path} needs {held * dtype.itemsize:,} bytes of memory, and the machine has"
            f" {memory:,}"
        )
