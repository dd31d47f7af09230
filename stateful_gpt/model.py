"""nanoGPT's architecture, with its state-dict names, and attention that can be modulated by key.

One reading returns hidden states, not logits: the V numbers per position are made only where
somebody asks for them. What the method asks of a model is said in ``language_model``.

Shapes: B batch, T tokens of this call, S tokens in the cache before it, C n_embd, H n_head,
D head size, L n_layer, V vocabulary.
"""

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stateful_gpt.attention import KeyValueCache, attend, score_mask
from stateful_gpt.language_model import PLAIN, Cache, Modulation
from stateful_gpt.untrusted import require_copy

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


@dataclass(frozen=True)
class GPTConfig:
    """nanoGPT's hyper-parameters."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    # of the embeddings and of what each block adds; fused kernels never form attention weights
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu"  # the erf form; the published GPT-2 was trained with gelu_tanh
    hidden_feedback: bool = False  # whether there is a gate to feed hidden states back through

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            self._require(name, type(value) is int and value >= 1, "a whole number of at least 1")
        for name in ("bias", "hidden_feedback"):
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        fits = self.n_embd % self.n_head == 0
        self._require("n_embd", fits, f"a multiple of n_head ({self.n_head})")
        rate = isinstance(self.dropout, (int, float)) and 0.0 <= self.dropout < 1.0
        self._require("dropout", rate, "at least 0 and below 1")
        known = isinstance(self.activation, str) and self.activation in ACTIVATIONS
        self._require("activation", known, f"one of {', '.join(ACTIVATIONS)}")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")


class LayerNorm(nn.LayerNorm):
    """Without the checks that take as long as the norm of a single token."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: Tensor, *, mask: Tensor | None, factor: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn.forward(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        pairs = qkv[1:] if cache is None else cache.extend(self.layer, qkv[1:])
        q, (k, v) = qkv[0], pairs.unbind(0)  # (B, H, T, D), (B, H, S + T, D) each
        y = attend(q, k, v, mask=mask, factor=factor)  # (B, H, T, D)
        return self.c_proj.forward(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.approximate = ACTIVATIONS[config.activation]
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj.forward(F.gelu(self.c_fc.forward(x), approximate=self.approximate))


class Block(nn.Module):
    """The parts of a layer; ``GPT.read`` says how they go together."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)


class Transformer(nn.Module):
    """The parts before the head, under the names that nanoGPT's state dict gives them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)


class HiddenGate(nn.Module):
    """How much of a hidden state enters a token embedding, component by component.

    ``sigmoid(e * (W_k h + b_k)) * (W_v h + b_v)`` for an embedding e and a hidden state h: the
    embedding is the query, and h gives key and value ("Stateful GPT"; compare LSTM's input gate). A
    hidden state of nothing but zeros stands for none and adds nothing: no layer norm makes one.
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.key = nn.Linear(n_embd, n_embd)
        self.value = nn.Linear(n_embd, n_embd)

    def forward(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """(B, T, C) to add to (B, T, C) embeddings, given a hidden state for each."""
        gate = torch.sigmoid(embedding * self.key(hidden))
        known = hidden.detach().ne(0).any(dim=-1, keepdim=True)  # (B, T, 1)
        out: Tensor = (gate * self.value(hidden)).masked_fill(~known, 0.0)
        return out


class GPT(nn.Module):
    """nanoGPT's decoder, unless it has a gate; ``wte`` and ``lm_head`` share a weight if tied."""

    def __init__(self, config: GPTConfig, *, tied: bool = True) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.transformer.wte.weight
        self.gate = HiddenGate(config.n_embd) if config.hidden_feedback else None
        self.block_size, self.vocab_size = config.block_size, config.vocab_size
        self.n_layer, self.width = config.n_layer, config.n_embd
        self.takes_hidden_states = config.hidden_feedback

    def initialize(self, *, generator: torch.Generator | None = None) -> None:
        """Draw nanoGPT's initial weights: N(0, 0.02), residual projections over sqrt(2 n_layer).

        The gate starts closed: its values are 0, so that feedback begins as a no-op. Models with
        and without one draw the same other weights from the same generator.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name == "gate.value.weight":
                nn.init.zeros_(parameter)
            elif ".ln_" in name:
                nn.init.ones_(parameter)
            else:
                residual = name.endswith("c_proj.weight")
                scale = 1.0 / math.sqrt(2 * self.config.n_layer) if residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale, generator=generator)

    @property
    def tied(self) -> bool:
        return self.lm_head.weight is self.transformer.wte.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def in_float64(self) -> "GPT":
        if self.dtype != torch.float64:
            require_copy(self)
        return self if self.dtype == torch.float64 else copy.deepcopy(self).double()

    def new_cache(self, *, batch: int, capacity: int) -> KeyValueCache:
        shape = (batch, self.config.n_head, capacity, self.width // self.config.n_head)
        return KeyValueCache(self.n_layer, shape, like=self.lm_head.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head.forward(hidden)  # (N, V)

    def read(
        self, tokens: Tensor, *, modulation: Modulation = PLAIN, cache: Cache | None = None
    ) -> Tensor:
        """Hidden states (B, T, C) after the final layer norm, of (B, T) ids."""
        assert cache is None or isinstance(cache, KeyValueCache)
        start = cache.length if cache is not None else 0
        end = start + tokens.size(1)
        if end > self.block_size:
            raise ValueError(f"{end} tokens do not fit the model's block of {self.block_size}")
        x = self.transformer.wte(tokens)  # (B, T, C)
        if modulation.hidden is not None:
            if self.gate is None:
                raise ValueError("the model has no gate to feed hidden states back through")
            enriched = self.gate(x, modulation.hidden.to(x.dtype))
            x = x + modulation.hidden_strength * enriched
        # what nobody learns from is read without dropout: a study of a model in training mode, too
        rate, drops = self.config.dropout, self.training and torch.is_grad_enabled()
        x = torch.dropout(x + self.transformer.wpe.weight[start:end], rate, drops)

        T, layers = tokens.size(1), modulation.layers
        plain, mask = (
            score_mask(T, end, bias, dtype=x.dtype, device=x.device)
            for bias in (None, modulation.bias)
        )
        for i, block in enumerate(cast("list[Block]", self.transformer.h)):
            modulated = layers is None or i in layers
            seen, factor = (mask, modulation.factor) if modulated else (plain, None)
            out = block.attn.forward(block.ln_1.forward(x), mask=seen, factor=factor, cache=cache)
            x = x + torch.dropout(out, rate, drops)
            x = x + torch.dropout(block.mlp.forward(block.ln_2.forward(x)), rate, drops)
        if cache is not None:
            cache.length = end
        return self.transformer.ln_f.forward(x)

    forward = read  # what calling a module asks for

    def count_parameters(self) -> int:
        """Number of weights; a shared one counts once."""
        return sum(p.numel() for p in self.parameters())
