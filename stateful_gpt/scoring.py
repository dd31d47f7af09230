"""What a pass says of tokens, read off its hidden states: log-probabilities, logits, divergences.

A model's V logits per position exist for a chunk of positions at a time.

Shapes: B batch, T tokens, N positions, C width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stateful_gpt.language_model import LanguageModel

# Finite, because 0 * -inf is NaN; far below what float32 logits of a trained model can produce.
LOG_PROB_FLOOR = -1e4

# Positions whose logits exist at one time: 13 MB for GPT-2 in float32. Larger blocks go back to the
# system when they are freed, and cost as much to get again as to fill.
CHUNK = 64


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of scores: float64 of a float64 model, float32 of any other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class TokenScores:
    """What a pass says of each token that is there: log-probability (nats) and raw logit."""

    log_probs: Tensor
    logits: Tensor


def logit_chunks(model: LanguageModel, hidden: Tensor) -> Iterator[Tensor]:
    """The (n, V) logits of (N, C) hidden states, CHUNK rows at a time, at least in float32."""
    for piece in hidden.split(CHUNK):
        logits = model.logits(piece)
        yield logits.to(wide(logits.dtype))


def score_logits(logits: Tensor, targets: Tensor) -> TokenScores:
    """Score (n,) targets by the (n, V) logits that predict them."""
    score = logits.gather(1, targets[:, None]).squeeze(1)  # (n,)
    # half the time of subtracting logsumexp
    log_probs = -F.cross_entropy(logits, targets, reduction="none")  # (n,)
    return TokenScores(log_probs=log_probs.clamp_min(LOG_PROB_FLOOR), logits=score)


def score_targets(model: LanguageModel, hidden: Tensor, targets: Tensor) -> TokenScores:
    """Score targets (...) by the hidden states (..., C) that predict them."""
    if targets.numel() == 0:
        nothing = hidden.new_empty(targets.shape, dtype=wide(hidden.dtype))
        return TokenScores(log_probs=nothing, logits=nothing)
    chunks = logit_chunks(model, hidden.flatten(0, -2))
    wanted = targets.flatten().split(CHUNK)
    pieces = [score_logits(logits, some) for logits, some in zip(chunks, wanted, strict=True)]
    return TokenScores(
        log_probs=torch.cat([piece.log_probs for piece in pieces]).view(targets.shape),
        logits=torch.cat([piece.logits for piece in pieces]).view(targets.shape),
    )


def score_tokens(model: LanguageModel, hidden: Tensor, tokens: Tensor) -> TokenScores:
    """Score every one of (B, T) tokens by the hidden state before it, of (B, T, C) of their pass.

    Position 0 gets probability 1 (log-probability 0, and logit 0): nothing predicts it.
    """
    rest = score_targets(model, hidden[:, :-1], tokens[:, 1:])
    return TokenScores(F.pad(rest.log_probs, (1, 0)), F.pad(rest.logits, (1, 0)))


class Predictions:
    """Next-token distributions of the plain model and of the pass before, to compare passes with.

    One product with the vocabulary per evaluated position gives its token's score and both
    divergences. Memory: 2 B T V numbers.

    Attributes:
        kl_effect: (B, T) KL(plain || this pass) of each position's prediction, in nats.
        kl_step: (B, T) KL(pass before || this pass); 0 where nothing was evaluated.
    """

    def __init__(self, model: LanguageModel, *, batch: int, length: int) -> None:
        self._model = model
        dtype, device = wide(model.dtype), model.device
        # time first: a range of positions of all rows lies in one piece
        shape = (length, batch, model.vocab_size)
        self._plain = torch.empty(shape, dtype=dtype, device=device)
        self._before = torch.empty(shape, dtype=dtype, device=device)
        self.kl_effect = torch.zeros(batch, length, dtype=dtype, device=device)
        self.kl_step = torch.zeros_like(self.kl_effect)
        self._known = 0  # positions that ``_before`` holds

    def keep(self, rows: list[int]) -> None:
        """Go on with some of the B texts."""
        self._plain, self._before = self._plain[:, rows], self._before[:, rows]
        self.kl_effect, self.kl_step = self.kl_effect[rows], self.kl_step[rows]

    def set_plain(self, hidden: Tensor, *, begin: int) -> None:
        """(B, N, C) hidden states of the plain model from position ``begin`` on."""
        for at, logits in self._chunks(hidden, begin):
            self._plain[at : at + len(logits)] = logits.log_softmax(dim=2)

    def score(self, hidden: Tensor, tokens: Tensor, *, begin: int, first: bool) -> TokenScores:
        """Score the tokens behind each position that a pass has evaluated, and compare.

        Args:
            hidden: (B, N, C) from position ``begin`` on, of (B, T) tokens.
            first: whether this pass is the plain model's.

        Returns:
            (B, N) of tokens ``begin + 1`` on, one fewer where the last token was evaluated.
        """
        log_probs, raw = [], []
        self.kl_step.zero_()
        for at, logits in self._chunks(hidden, begin):
            end = at + len(logits)
            targets = tokens[:, at + 1 : end + 1].T[:, :, None]  # (n, B, 1), n - 1 at the end
            log_q = logits.log_softmax(dim=2)
            log_probs.append(log_q[: len(targets)].gather(2, targets).squeeze(2))
            raw.append(logits[: len(targets)].gather(2, targets).squeeze(2))
            if first:
                self._plain[at:end] = log_q
            else:
                self.kl_effect[:, at:end] = _divergence(self._plain[at:end], log_q).T
            if (known := min(end, self._known)) > at:
                step = _divergence(self._before[at:known], log_q[: known - at])
                self.kl_step[:, at:known] = step.T
            self._before[at:end] = log_q
        self._known = max(self._known, begin + hidden.size(1))
        return TokenScores(torch.cat(log_probs).clamp_min(LOG_PROB_FLOOR).T, torch.cat(raw).T)

    def _chunks(self, hidden: Tensor, at: int) -> Iterator[tuple[int, Tensor]]:
        """Positions from ``at`` on, each with the (n, B, V) logits of n of them."""
        batch = len(hidden)
        for piece in hidden.transpose(0, 1).split(max(1, CHUNK // batch)):
            logits = self._model.logits(piece.flatten(0, 1))
            yield at, logits.to(wide(logits.dtype)).view(len(piece), batch, -1)
            at += len(piece)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(...) KL(P || Q) in nats of (..., V) log-probabilities."""
    p, ratio = log_p.exp(), log_q - log_p
    divergence: Tensor = -torch.linalg.vecdot(p, ratio)
    # q - p sums to 0; of distributions that are near it takes the rounding of the ratio away
    near = (ratio.amax(dim=-1) < 1.0) & (ratio.amin(dim=-1) > -1.0)
    difference = torch.linalg.vecdot(p, ratio.clamp_(max=1.0).expm1_())
    divergence = divergence + difference.where(near, 0.0)
    return divergence.clamp_min(0.0)


def mean_kl(model: LanguageModel, hidden_p: Tensor, hidden_q: Tensor) -> float:
    """KL(P || Q) in nats of next-token distributions, mean over (N, C) hidden states of each."""
    total = 0.0
    for p, q in zip(logit_chunks(model, hidden_p), logit_chunks(model, hidden_q), strict=True):
        total += _divergence(p.log_softmax(dim=1), q.log_softmax(dim=1)).sum().item()
    return total / hidden_p.size(0)
