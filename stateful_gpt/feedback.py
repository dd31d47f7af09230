"""What a pass hands to the next: estimates per token, and how they act on the model.

Shapes: B batch, T tokens, C n_embd, V vocabulary.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stateful_gpt.language_model import PLAIN, LanguageModel, Modulation
from stateful_gpt.scoring import TokenScores, wide

# Of a factor, so that a layer norm can square what it multiplies, and 0 * inf reaches no position
# before the token. One for every precision: a solution in float64 is that of the same feedback.
LARGEST_WEIGHTED = math.log(torch.finfo(torch.float32).max) / 3


class FeedbackKind(Enum):
    """How a token's estimate acts on attention to it."""

    LOG_PROB = "log_prob"
    LOGIT = "logit"
    PROB = "prob"
    NONE = "none"


HIDDEN_STATE = "hidden_state"
KINDS = (*(kind.value for kind in FeedbackKind), HIDDEN_STATE)  # as users name them


@dataclass(frozen=True)
class Feedback:
    """What a pass hands to the next: an estimate of every token, a hidden state, or both.

    The probability of a token acts on the attention that it receives as a key. With l_j the
    log-probability of token j in nats, z_j its raw logit and b the strength:

    - ``log_prob``: ``score_ij + b l_j`` before softmax, which equals multiplying the softmaxed row
      by ``p_j ** b`` and renormalising it;
    - ``logit``: ``score_ij + b z_j`` before softmax;
    - ``prob``: ``weight_ij * p_j ** b`` after softmax, rows not renormalised (the factor is at most
      e**29, the cube root of the largest number of float32).

    A positive strength attends to what the model expected, a negative one to what surprised it,
    and 0 is the plain model exactly, as is the kind ``none``.

    The hidden state enriches a token's embedding through the model's gate (``model.HiddenGate``).
    With ``shift`` 1 it is that of the step that produced the token, at the position before it; as
    an estimate of the token it is on a par with its probability, and what holds of the one (see
    ``recompute``) holds of the other. With ``shift`` 0 every position feeds itself: nothing bounds
    the number of passes then, and estimates may cycle or diverge.

    The state of n tokens is (B, n) of token estimates, or (B, n, C) of hidden states, or
    (B, n, 1 + C) of both side by side. Zeros stand for nothing known.
    """

    kind: FeedbackKind = FeedbackKind.LOG_PROB
    strength: float = 1.0
    layers: Collection[int] | None = None  # whose attention is modulated; None means all of them
    hidden_strength: float = 0.0  # multiplies what is added to embeddings; 0 feeds none back
    shift: Literal[0, 1] = 1

    def __post_init__(self) -> None:
        # a name would act as a log_prob of full strength, whatever it says
        if not isinstance(self.kind, FeedbackKind):
            raise ValueError(f"kind must be a FeedbackKind, got {self.kind!r}: see of_kind")
        if not isinstance(self.layers, Collection | None):  # an iterator would be read but once
            raise ValueError(f"layers must be None or a collection of numbers, got {self.layers!r}")
        if self.shift not in (0, 1):
            raise ValueError(f"shift must be 0 or 1, got {self.shift!r}")

    @classmethod
    def of_kind(
        cls,
        kind: str,
        strength: float,
        *,
        layers: Collection[int] | None = None,
        hidden_strength: float = 0.0,
        shift: Literal[0, 1] = 1,
    ) -> "Feedback":
        """The feedback of one of KINDS; of hidden states alone, ``strength`` is that of theirs.

        Raises:
            ValueError: no such kind, or settings that hidden states alone do not have.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == HIDDEN_STATE:
            if layers is not None or hidden_strength != 0.0:
                raise ValueError(
                    "layers must be None and hidden_strength 0 with hidden_state, which enriches"
                    f" embeddings at its own strength, got {layers!r} and {hidden_strength}"
                )
            return cls(FeedbackKind.NONE, 0.0, hidden_strength=strength, shift=shift)
        return cls(FeedbackKind(kind), strength, layers, hidden_strength, shift)

    @property
    def of_tokens(self) -> bool:
        """Whether token estimates are fed back."""
        return self.kind is not FeedbackKind.NONE and self.strength != 0.0

    @property
    def of_hidden(self) -> bool:
        return self.hidden_strength != 0.0

    @property
    def active(self) -> bool:
        return self.of_tokens or self.of_hidden

    @property
    def triangular(self) -> bool:
        """Whether what a pass says of a token depends only on the state of tokens before it."""
        return not (self.of_hidden and self.shift == 0)

    def blank(self, *shape: int, model: LanguageModel) -> Tensor:
        """The state of tokens of which nothing is known, in the precision of scores.

        Raises:
            ValueError: layers that the model does not have.
        """
        for layer in () if self.layers is None else self.layers:
            if layer not in range(model.n_layer):
                raise ValueError(f"layers must be from 0 to {model.n_layer - 1}, got {layer}")
        width = (model.width + self.of_tokens,) if self.of_hidden else ()
        return torch.zeros(*shape, *width, dtype=wide(model.dtype), device=model.device)

    def modulation(self, state: Tensor | None, *, begin: int = 0) -> Modulation:
        """What a state of all tokens that are read does to a pass over those from ``begin`` on.

        None stands for nothing known: probability 1 everywhere.
        """
        if state is None or not self.active:
            return PLAIN  # skipped, not multiplied by 0: the plain model bit for bit
        bias = factor = hidden = None
        if self.of_hidden:
            hidden = state[:, begin:, 1:] if self.of_tokens else state[:, begin:]
        if self.of_tokens:
            weighted = self.strength * (state[..., 0] if self.of_hidden else state)
            by_factor = self.kind is FeedbackKind.PROB
            bias = None if by_factor else weighted
            factor = weighted.clamp(max=LARGEST_WEIGHTED).exp() if by_factor else None
        return Modulation(bias, factor, self.layers, hidden, self.hidden_strength)

    def estimates(self, scores: TokenScores, hidden: Tensor) -> Tensor:
        """The state of tokens (...), from their scores and the (..., C) that each is fed."""
        of_tokens = scores.logits if self.kind is FeedbackKind.LOGIT else scores.log_probs
        if not self.of_hidden:
            return of_tokens
        hidden = hidden.to(of_tokens.dtype)
        return torch.cat([of_tokens[..., None], hidden], dim=-1) if self.of_tokens else hidden


def shift_right(hidden: Tensor) -> Tensor:
    """Of (B, T, C) hidden states, to each token the one before it; to the first, zeros."""
    return F.pad(hidden[:, :-1], (0, 0, 1, 0))
