"""nanoGPT's architecture, with its state-dict names, and attention that can be modulated by key.

One forward pass returns hidden states, not logits: the V numbers per position are made only where
somebody asks for them (see ``stateful_gpt.feedback.token_log_probs``).

Shapes: B batch, T tokens of this call, S tokens in the cache before it, C n_embd, H n_head,
V vocabulary.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stateful_gpt.attention import (
    Attention,
    KeyColumns,
    causal_mask,
    flash_runs,
    key_columns,
    reference_attention,
    score_mask,
    sdpa_attention,
)

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


@dataclass(frozen=True)
class GPTConfig:
    """nanoGPT's hyper-parameters.

    ``activation`` is ``gelu`` (the erf form: nanoGPT, this project) or ``gelu_tanh`` (the form
    the published GPT-2 weights were trained with). ``dropout`` acts on the embeddings and on what
    each block adds, not on the attention weights, which the fused kernels never form.
    ``hidden_feedback`` adds the gate through which hidden states can be fed back.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu"
    hidden_feedback: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("bias", "hidden_feedback"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head ({self.n_head}), got {self.n_embd}"
            )
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )


class Cache:
    """Keys and values of tokens already read, for B sequences of up to ``capacity`` tokens.

    They stay right only while nothing changes what those tokens were computed from: an unsettled
    prefix must not be cached.
    """

    def __init__(self, config: GPTConfig, *, batch: int, capacity: int, like: Tensor) -> None:
        head = config.n_embd // config.n_head
        self.pairs = like.new_empty(config.n_layer, 2, batch, config.n_head, capacity, head)
        self.keys, self.values = self.pairs[:, 0], self.pairs[:, 1]  # (L, B, H, capacity, D)
        self.capacity = capacity
        self.length = 0

    def keep(self, rows: list[int]) -> None:
        """Go on with some of the sequences."""
        self.pairs = self.pairs[:, :, rows]
        self.keys, self.values = self.pairs[:, 0], self.pairs[:, 1]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, D) behind the cached tokens; return all of them, (B, H, S + T, D)."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class LayerNorm(nn.Module):
    """Layer normalisation whose bias can be left out."""

    def __init__(self, n_embd: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.implementation = Attention.SDPA

    def forward(
        self,
        x: Tensor,
        *,
        layer: int,
        mask: Tensor | KeyColumns | None,
        key_factor: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, S + T, D)
        attend = sdpa_attention if self.implementation is Attention.SDPA else reference_attention
        y = attend(q, k, v, mask=mask, key_factor=key_factor)
        y = y.transpose(1, 2).reshape(B, T, C)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=ACTIVATIONS[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(x))))
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        *,
        layer: int,
        mask: Tensor | KeyColumns | None,
        key_factor: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), layer=layer, mask=mask, key_factor=key_factor, cache=cache)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """The parts before the head, under the names that nanoGPT's state dict gives them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.h))


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
        """(B, T, C) to add to (B, T, C) embeddings, given a hidden state (B, T, C) for each."""
        gate = torch.sigmoid(embedding * self.key(hidden))
        known = hidden.detach().ne(0).any(dim=-1, keepdim=True)  # (B, T, 1)
        out: Tensor = (gate * self.value(hidden)).masked_fill(~known, 0.0)
        return out


class GPT(nn.Module):
    """nanoGPT's decoder. ``transformer.wte`` and ``lm_head`` share one weight unless untied.

    With ``hidden_feedback`` it also has a ``gate``; without one it is nanoGPT's exactly.
    """

    def __init__(self, config: GPTConfig, *, tied: bool = True) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.transformer.wte.weight
        self.gate = HiddenGate(config.n_embd) if config.hidden_feedback else None

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

    def with_gate(self, *, generator: torch.Generator | None = None) -> "GPT":
        """The same weights with a gate that starts closed: what to fine-tune a plain model from.

        Raises:
            ValueError: the model has a gate already.
        """
        if self.gate is not None:
            raise ValueError("the model has a hidden-state gate already")
        weight = self.transformer.wte.weight
        model = GPT(replace(self.config, hidden_feedback=True), tied=self.tied)
        model.initialize(generator=generator)
        model.load_state_dict(self.state_dict(), strict=False)
        return model.to(weight.device, weight.dtype)

    @property
    def tied(self) -> bool:
        return self.lm_head.weight is self.transformer.wte.weight

    def use_attention(self, implementation: Attention) -> None:
        """Choose how every layer computes attention (the default is SDPA)."""
        for block in self.transformer.blocks:
            block.attn.implementation = implementation

    def new_cache(self, *, batch: int, capacity: int) -> Cache:
        """An empty cache on the model's device and in its dtype."""
        return Cache(self.config, batch=batch, capacity=capacity, like=self.transformer.wte.weight)

    def forward(
        self,
        tokens: Tensor,
        *,
        key_bias: Tensor | None = None,
        key_factor: Tensor | None = None,
        layers: Collection[int] | None = None,
        attend: Tensor | None = None,
        hidden: Tensor | None = None,
        hidden_strength: float = 1.0,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states after the final layer norm; ``lm_head`` makes logits of them.

        With neither ``key_bias`` nor ``key_factor`` nor ``hidden`` this is the plain model, bit for
        bit.

        Args:
            tokens: (B, T) ids. Pad shorter sequences of a batch on the right: causality keeps
                padding out of every real position.
            key_bias: (B, S + T), added to the attention scores of each key in every head.
            key_factor: (B, S + T), multiplies each key's softmaxed weights in every head.
            layers: the layers that are modulated; None means all.
            attend: (B, S + T) boolean, True = attend: keys hidden from all queries but their own.
            hidden: (B, T, C) hidden state that enriches each of these tokens through the gate;
                zeros where there is none.
            hidden_strength: multiplies what the gate adds to the token embeddings.
            cache: keys and values of the S tokens before these; extended by this call.

        Returns:
            (B, T, C)

        Raises:
            ValueError: more than ``block_size`` positions, or hidden states without a gate.
        """
        T = tokens.size(1)
        start = cache.length if cache is not None else 0
        end = start + T
        if end > self.config.block_size:
            raise ValueError(
                f"{end} tokens do not fit the model's block of {self.config.block_size}"
            )
        x = self.transformer.wte(tokens)  # (B, T, C)
        if hidden is not None:
            if self.gate is None:
                raise ValueError("the model has no gate to feed hidden states back through")
            x = x + hidden_strength * self.gate(x, hidden.to(x.dtype))
        x = self.transformer.drop(x + self.transformer.wpe.weight[start:end])

        # one query sees every key: of its mask only the bias is left
        one = T == 1 and attend is None
        # and where the flash kernel runs, the bias rides on the keys
        flash = start == 0 and attend is None and flash_runs(x)
        visible: Tensor | None = None
        if (
            (key_bias is not None and not one and not flash)
            or attend is not None
            or (start > 0 and T > 1)
        ):
            visible = causal_mask(T, end, device=tokens.device)
            if attend is not None:
                # a hidden key still sees itself, so that no row of attention is empty
                own = torch.eye(end, dtype=torch.bool, device=tokens.device)[start:]
                visible = visible & (attend[:, None, None, :] | own)
        plain_mask: Tensor | None = None
        if attend is not None or (start > 0 and T > 1):
            assert visible is not None
            plain_mask = score_mask(visible, None, dtype=x.dtype)
        mask: Tensor | KeyColumns | None = plain_mask
        if key_bias is not None and flash:
            head_size = self.config.n_embd // self.config.n_head
            mask = key_columns(key_bias, head_size=head_size, dtype=x.dtype)
        elif key_bias is not None and one:
            mask = key_bias[:, None, None, :].to(x.dtype)
        elif key_bias is not None:
            assert visible is not None
            mask = score_mask(visible, key_bias, dtype=x.dtype)

        for i, block in enumerate(self.transformer.blocks):
            modulated = layers is None or i in layers
            x = block(
                x,
                layer=i,
                mask=mask if modulated else plain_mask,
                key_factor=key_factor if modulated else None,
                cache=cache,
            )
        if cache is not None:
            cache.length = end
        out: Tensor = self.transformer.ln_f(x)
        return out

    def count_parameters(self) -> int:
        """Number of weights; a shared one counts once."""
        return sum(p.numel() for p in self.parameters())
