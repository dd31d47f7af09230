"""What a pass hands to the next: an estimate per token, and how it modulates attention.

Shapes: B batch, T tokens, C n_embd, V vocabulary.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from stateful_gpt.model import GPT

# Finite, because 0 * -inf is NaN; far below what float32 logits of a trained model can produce.
LOG_PROB_FLOOR = -1e4

# Positions whose logits exist at one time: 35 MB for GPT-2 in float32. Blocks below 32 MB may stay
# with the process when they are freed, and pile up.
CHUNK = 176


class FeedbackKind(Enum):
    """How a token's estimate acts on attention to it (``design`` of each: see TokenFeedback)."""

    LOG_PROB = "log_prob"
    LOGIT = "logit"
    PROB = "prob"
    NONE = "none"


@dataclass(frozen=True)
class KeyModulation:
    """Numbers per key for ``GPT.forward``: at most one of the two is given, each (B, T)."""

    bias: Tensor | None = None
    factor: Tensor | None = None


@dataclass(frozen=True)
class TokenFeedback:
    """Feedback of every token's own estimate to the attention it receives as a key.

    With l_j the log-probability of token j in nats, z_j its raw logit and b the strength:

    - ``log_prob``: ``score_ij + b l_j`` before softmax, which equals multiplying the softmaxed row
      by ``p_j ** b`` and renormalising it;
    - ``logit``: ``score_ij + b z_j`` before softmax;
    - ``prob``: ``weight_ij * p_j ** b`` after softmax, rows not renormalised (the factor is at most
      the square root of the largest number of its format).

    A positive strength attends to what the model expected, a negative one to what surprised it,
    and 0 is the plain model exactly, as is the kind ``none``.

    Attributes:
        layers: the layers that are modulated; None means all of them.
    """

    kind: FeedbackKind = FeedbackKind.LOG_PROB
    strength: float = 1.0
    layers: Collection[int] | None = None

    @property
    def active(self) -> bool:
        """Whether anything is fed back at all."""
        return self.kind is not FeedbackKind.NONE and self.strength != 0.0

    def modulation(self, estimates: Tensor | None) -> KeyModulation:
        """What (B, T) estimates do to attention. None stands for probability 1 everywhere."""
        if estimates is None or not self.active:
            return KeyModulation()  # skipped, not multiplied by 0: the plain model bit for bit
        weighted = self.strength * estimates
        if self.kind is FeedbackKind.PROB:
            # finite, or 0 * inf would reach the positions before the token as NaN
            most = math.log(torch.finfo(weighted.dtype).max) / 2
            return KeyModulation(factor=weighted.clamp(max=most).exp())
        return KeyModulation(bias=weighted)

    def estimates(self, scores: "TokenScores") -> Tensor:
        """The (B, T) numbers that this kind of feedback hands on."""
        return scores.logits if self.kind is FeedbackKind.LOGIT else scores.log_probs


@dataclass(frozen=True)
class TokenScores:
    """What a pass says of each token that is there: log-probability (nats) and raw logit."""

    log_probs: Tensor
    logits: Tensor


def logit_chunks(model: GPT, hidden: Tensor, *, chunk: int = CHUNK) -> Iterator[Tensor]:
    """The (n, V) logits of (N, C) hidden states, ``chunk`` rows at a time, at least in float32."""
    for piece in hidden.split(chunk):
        logits = model.lm_head(piece)
        yield logits if logits.dtype == torch.float64 else logits.float()


def score_logits(logits: Tensor, targets: Tensor) -> TokenScores:
    """Score (n,) targets by the (n, V) logits that predict them."""
    score = logits.gather(1, targets[:, None]).squeeze(1)  # (n,)
    log_probs = (score - logits.logsumexp(dim=1)).clamp_min(LOG_PROB_FLOOR)
    return TokenScores(log_probs=log_probs, logits=score)


def score_targets(
    model: GPT, hidden: Tensor, targets: Tensor, *, chunk: int = CHUNK
) -> TokenScores:
    """Score targets (...) by the hidden states (..., C) that predict them."""
    pieces = [
        score_logits(logits, wanted)
        for logits, wanted in zip(
            logit_chunks(model, hidden.flatten(0, -2), chunk=chunk),
            targets.flatten().split(chunk),
            strict=True,
        )
    ]
    return TokenScores(
        log_probs=torch.cat([piece.log_probs for piece in pieces]).view(targets.shape),
        logits=torch.cat([piece.logits for piece in pieces]).view(targets.shape),
    )


def score_tokens(model: GPT, hidden: Tensor, tokens: Tensor, *, chunk: int = CHUNK) -> TokenScores:
    """Score every token of a text by the hidden state before it.

    Args:
        hidden: (B, T, C), of the pass over these tokens.
        tokens: (B, T) ids.

    Returns:
        (B, T) each. Position 0 gets probability 1 (log-probability 0, and logit 0): nothing
        predicts it.
    """
    first = hidden.new_zeros(
        tokens.size(0), 1, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32
    )
    if tokens.size(1) == 1:
        return TokenScores(log_probs=first, logits=first)
    rest = score_targets(model, hidden[:, :-1], tokens[:, 1:], chunk=chunk)
    return TokenScores(
        log_probs=torch.cat([first, rest.log_probs], dim=1),
        logits=torch.cat([first, rest.logits], dim=1),
    )


def mean_kls(
    model: GPT, others: Sequence[Tensor], hidden: Tensor, *, chunk: int = CHUNK
) -> list[float]:
    """KL(P || Q) in nats between next-token distributions, averaged over positions.

    Args:
        others: (N, C) hidden states each; every one is a P.
        hidden: (N, C) hidden states that Q is read from.

    Returns:
        One number for each of ``others``.
    """
    totals = [0.0] * len(others)
    logits_of_others = [logit_chunks(model, other, chunk=chunk) for other in others]
    for logits in logit_chunks(model, hidden, chunk=chunk):
        log_q = logits.log_softmax(dim=1)
        for i, chunks in enumerate(logits_of_others):
            log_p = next(chunks).log_softmax(dim=1)
            totals[i] += (log_p.exp() * (log_p - log_q)).sum().item()
    # rounding alone can make a KL of 0 negative
    return [max(0.0, total / hidden.size(0)) for total in totals]
