"""What the method asks of a model, and all that it knows of one.

Feedback, recompute, oracle, generate and the measures read texts through this face alone; ``GPT``
answers it, and so does the adapter for the models of Hugging Face.

Shapes: B batch, T tokens of this call, S tokens in the cache before it, C width, V vocabulary.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modulation:
    """What is fed into a pass. With nothing given, it is the plain model, bit for bit."""

    bias: Tensor | None = None  # (B, S + T), added to each key's attention scores in every head
    # (B, S + T), multiplies each key's softmaxed weights in every head, without renormalising; at
    # most one of bias and factor is given
    factor: Tensor | None = None
    layers: Collection[int] | None = None  # whose attention is modulated; None means all
    hidden: Tensor | None = None  # (B, T, C), enriches each token's embedding; zeros stand for none
    hidden_strength: float = 1.0  # multiplies what hidden states add to the embeddings


PLAIN = Modulation()


class Cache(Protocol):
    """Keys and values of tokens already read, for B sequences.

    They stay right only while nothing changes what those tokens were computed from. No gradients
    flow through them: what is read with a cache is read under ``torch.no_grad``.
    """

    length: int  # tokens that count. It may be set back: what lies behind is forgotten

    def keep(self, rows: list[int]) -> None:
        """Go on with some of the B sequences, in this order; one may be named several times."""
        ...


class LanguageModel(Protocol):
    """A causal language model whose attention takes a number per key."""

    block_size: int  # the most tokens of a text; of the model, never of what is allocated
    vocab_size: int  # V, the ids that it knows
    n_layer: int
    width: int  # C
    takes_hidden_states: bool  # whether there is a gate through which they can be fed back

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(
        self, tokens: Tensor, *, modulation: Modulation = PLAIN, cache: Cache | None = None
    ) -> Tensor:
        """Hidden states (B, T, C) that ``logits`` takes, of (B, T) tokens behind what is cached.

        Shorter texts of a batch are padded on the right: causality keeps padding out of every real
        position. The cache is extended by these tokens.

        Raises:
            ValueError: more than ``block_size`` positions, or hidden states without a gate.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) logits of (N, C) hidden states."""
        ...

    def new_cache(self, *, batch: int, capacity: int) -> Cache:
        """An empty cache for ``batch`` texts of up to ``capacity`` tokens."""
        ...

    def in_float64(self) -> "LanguageModel":
        """The model itself if it computes in float64, else a copy that does, or MemoryError."""
        ...
