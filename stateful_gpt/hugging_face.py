"""Any causal language model of transformers behind the face that the method asks for.

Transformers is imported only here and in ``hugging_face_folder``, and only where it is used.
Attention itself stays the model's business: a function registered with transformers adds the bias
to the mask and multiplies the values by the factor, then hands over to the attention that the model
was written for. Which models that reaches is found out, not looked up: each is checked over a few
tokens before it is used, and what does not pass is refused.

Shapes: B batch, T tokens of this call, S tokens in the cache before it, C width, V vocabulary.
"""

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stateful_gpt.console import cut, exhausted
from stateful_gpt.language_model import PLAIN, Cache, Modulation
from stateful_gpt.untrusted import CheckpointError, require_copy

ATTENTION = "stateful_gpt"  # transformers makes checks of its own where "sdpa" is in the name


@dataclass(frozen=True)
class _Reading:
    """What the registered functions know of the pass in which transformers calls them."""

    modulation: Modulation
    asked: set[int | None] = field(default_factory=set)  # the layers that did


# because some models lose keyword arguments on the way
_READING: ContextVar[_Reading] = ContextVar("reading")


class HuggingFaceModel:
    """A causal model of transformers that answers as ``language_model.LanguageModel``.

    The weights are shared with ``model``, whose own settings stay what they were.

    Raises:
        CheckpointError: an architecture whose attention cannot be reached, or one that does not say
            the same with and without a cache.
    """

    takes_hidden_states = False

    def __init__(self, model: Any) -> None:
        _register()
        self._model = _with_same_weights(model.eval())
        self._decoder = _decoder(self._model)
        takes = inspect.signature(self._decoder.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"
        self.device: torch.device = self._model.device
        self.dtype: torch.dtype = self._model.dtype
        self._head = _with_same_weights(self._model, {id(self._decoder): _HandsOn()})
        settings = self._model.config.get_text_config()
        # BART's family has two counts, and the common name stands for the encoder's
        self.n_layer: int = getattr(settings, "decoder_layers", None) or settings.num_hidden_layers
        self.vocab_size: int = self._model.get_input_embeddings().weight.size(0)
        self.width, self.block_size = 0, _positions(settings, self._decoder)
        with quiet():
            self._model.set_attn_implementation(ATTENTION)
            if self.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
                self._model.set_experts_implementation("eager")  # the default one has no float64
            self._check()

    def read(
        self, tokens: Tensor, *, modulation: Modulation = PLAIN, cache: Cache | None = None
    ) -> Tensor:
        """As in ``LanguageModel.read``."""
        end = tokens.size(1) + (cache.length if cache is not None else 0)
        if end > self.block_size:
            raise ValueError(f"{end} tokens do not fit the model's block of {self.block_size}")
        if modulation.hidden is not None:
            raise ValueError("the model has no gate to feed hidden states back through")
        return self._read(tokens, _Reading(modulation), cache)

    def _read(self, tokens: Tensor, reading: _Reading, cache: Cache | None = None) -> Tensor:
        assert cache is None or isinstance(cache, KeysAndValues)
        kept = {} if cache is None else {self._cache_name: cache.pairs}
        token = _READING.set(reading)
        try:
            with self._precision():
                output = self._decoder(input_ids=tokens, use_cache=cache is not None, **kept)
        finally:
            _READING.reset(token)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) logits of (N, C) hidden states, with whatever the model does to them."""
        with self._precision():
            logits: Tensor = self._head(inputs_embeds=hidden[None]).logits[0]
        return logits

    def new_cache(self, *, batch: int, capacity: int) -> Cache:
        """An empty cache, which grows with the text."""
        return KeysAndValues()

    def in_float64(self) -> "HuggingFaceModel":
        if self.dtype == torch.float64:
            return self
        require_float64(self._model)
        require_copy(self._model)
        return HuggingFaceModel(copy.deepcopy(self._model).double())

    def _precision(self) -> AbstractContextManager[object]:
        return Float64() if self.dtype == torch.float64 else nullcontext()

    @torch.no_grad()
    def _check(self) -> None:
        """Refuse what does not take a number per key, or says something else by another way."""
        architecture = f"models of the architecture {type(self._model).__name__}"
        refused = f"{architecture} cannot be studied"
        padding = getattr(self._model.config.get_text_config(), "pad_token_id", None)
        some = [i for i in range(1, 8) if i != padding][:6]  # RoBERTa gives padding no position
        ids = torch.tensor([some], device=self.device) % self.vocab_size
        reading = _Reading(PLAIN)
        with one_sentence(f"{architecture} cannot be read"):
            hidden = self._read(ids, reading)
            if missed := set(range(self.n_layer)) - reading.asked:
                raise CheckpointError(
                    f"{refused}: layer {min(missed)} has no attention into which transformers lets"
                    " a number per key be fed"
                )
            cache = self.new_cache(batch=1, capacity=6)
            by_cache = torch.empty_like(hidden)
            for start, end in ((0, 3), (3, 5), (4, 6)):
                cache.length = start
                by_cache[:, start:end] = self._read(ids[:, start:end], _Reading(PLAIN), cache)
        self.width = hidden.size(-1)
        plain = _with_same_weights(self._model)
        plain.set_attn_implementation("eager")
        with self._precision():
            expected = plain(input_ids=ids, use_cache=False).logits[0]
        if not bool(expected.isfinite().all()):
            raise CheckpointError(
                f"the outputs of this {type(self._model).__name__} are not finite: its weights are"
                f" damaged, or too large for {self.dtype}"
            )
        self.vocab_size = min(self.vocab_size, expected.size(-1))  # Moshi's head has fewer ids
        close = expected.abs().max().clamp_min(1.0) * torch.finfo(self.dtype).eps ** 0.5
        ways = {
            "hidden states handed to its head": hidden,
            "keys and values kept of earlier tokens": by_cache,
        }
        for way, said in ways.items():
            logits = self.logits(said[0])
            if logits.shape != expected.shape or not bool((logits - expected).abs().max() <= close):
                if self.dtype.itemsize == 2:  # rounding may do that: in float32 the weights decide
                    HuggingFaceModel(copy.deepcopy(self._model).float())
                    break
                raise CheckpointError(
                    f"{refused}: with {way} it says something else than transformers does of the"
                    " whole text"
                )
        if self.block_size == sys.maxsize:
            raise CheckpointError(f"{refused}: their settings lack max_position_embeddings")


class KeysAndValues:
    """The cache of a model of transformers, whole in every layer, sliding ones included."""

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.pairs = DynamicCache()

    @property
    def length(self) -> int:
        return int(self.pairs.get_seq_length())

    @length.setter
    def length(self, value: int) -> None:
        if not 0 <= value <= self.length:
            raise ValueError(f"the length must be from 0 to {self.length}, got {value}")
        if value < self.length:
            self.pairs.crop(value - self.length)

    def keep(self, rows: list[int]) -> None:
        """As in ``language_model.Cache.keep``."""
        self.pairs.batch_select_indices(torch.tensor(rows))


class _HandsOn(nn.Module):
    """Stands in for the decoder where only the head of a model is wanted."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> "_Handed":
        return _Handed([inputs_embeds])


class _Handed(tuple[Tensor]):
    """Hidden states as a decoder puts them out, and nothing of all else that it could."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


class Float64(TorchFunctionMode):
    """Widens what models cast to float32: norms, rotary angles and softmaxes above all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, of (B, H, T, D) queries, with what the pass is fed."""
    from transformers import AttentionInterface

    reading, layer = _READING.get(), getattr(module, "layer_idx", None)
    reading.asked.add(layer)
    fed, mask = reading.modulation, attention_mask
    modulated = fed.layers is None or layer in fed.layers
    bias, factor = (fed.bias, fed.factor) if modulated else (None, None)
    # neither is known to the fused kernels
    eager = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if factor is not None:
        # rows of weights times f, applied to v, are the weights applied to f times v
        value = value * factor[:, None, :, None].to(value.dtype)
    if eager or bias is not None:
        if mask is None:
            T, end = query.size(2), key.size(2)
            mask = torch.ones(1, 1, T, end, dtype=torch.bool, device=key.device).tril(end - T)
        if mask.dtype == torch.bool:
            mask = query.new_zeros(()).masked_fill(~mask, -torch.inf)  # (B or 1, 1, T, S + T)
        if bias is not None:
            mask = mask + bias[:, None, None, :].to(query.dtype)
    own = sys.modules[type(module).__module__].eager_attention_forward if eager else None
    attention = own or AttentionInterface()["sdpa"]
    attended: tuple[Tensor, Tensor | None] = attention(module, query, key, value, mask, **kwargs)
    return attended


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attend)
    # without a mask function of our own, transformers would make no mask at all
    AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])


def _with_same_weights(model: Any, instead: dict[int, nn.Module] | None = None) -> Any:
    """A model with settings of its own and the same tensors; ``instead`` maps id to replacement."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo | (instead or {}))


def _decoder(model: Any) -> Any:
    """All of a model but its head."""
    base = model.base_model
    if base is model:  # it is called something else than the class says
        base = getattr(model, "model", model)
    return getattr(base, "decoder", base)


def _positions(settings: Any, decoder: nn.Module) -> int:
    """The longest text whose earlier positions do not change with its length."""
    most: int = getattr(settings, "max_position_embeddings", None) or sys.maxsize
    table = getattr(getattr(decoder, "embeddings", None), "position_embeddings", None)
    if (padding := getattr(table, "padding_idx", None)) is not None:
        most -= padding + 1  # RoBERTa's begin behind it
    ropes = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None)
    for rope in (ropes, *ropes.values()) if isinstance(ropes, dict) else ():
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
        if kind in ("longrope", "dynamic"):
            key = "original_max_position_embeddings"
            most = min(most, int(rope.get(key) or getattr(settings, key, None) or most))
    return most


def require_float64(model: Any) -> None:
    """Raises CheckpointError where the weights of a model of transformers are quantized."""
    if getattr(model, "is_quantized", False):
        raise CheckpointError("quantized weights have no float64")


@contextmanager
def one_sentence(said: str) -> Iterator[None]:
    """What the code of a model raises, of any kind, behind what is said of the model."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CheckpointError) or exhausted(error):
            raise
        raise CheckpointError(f"{said}: {type(error).__name__}: {cut(error)}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers prints: what matters of it becomes a sentence."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
