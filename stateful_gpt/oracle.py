"""The exact fixed point, read from left to right, and how a disturbance grows along the text.

The estimate of a token depends only on the estimates before it, so one evaluation in reading order
computes the fixed point that the recompute loop iterates towards.

Shapes: B batch, T tokens, S tokens read so far.
"""

import math

import torch
from torch import Tensor

from stateful_gpt.feedback import Feedback, score_targets, wide
from stateful_gpt.model import GPT

LINEAR_RANGE = (1e-12, 1e-3)  # nats: above float64 rounding, below where a response saturates
NUDGE = 1e-7  # nats


class LeftToRight:
    """Reads texts token by token, each with the final estimates of all tokens before it.

    Every token is evaluated once, over cached keys and values: they are final when they are made.
    Hidden states fed back to their own position have no such order: a ValueError.

    Attributes:
        log_probs: (B, S) nats, of the tokens read so far; 0 at position 0.
    """

    def __init__(self, model: GPT, feedback: Feedback, *, batch: int = 1) -> None:
        self.model = model
        self.feedback = feedback
        if not feedback.triangular:
            raise ValueError("hidden states fed back to their own position cannot be read in order")
        like, block = model.lm_head.weight[:0], model.config.block_size
        self._cache = model.new_cache(batch=batch, capacity=block)
        self._state = feedback.blank(batch, block, like=like)
        self._log_probs = torch.zeros(batch, block, dtype=wide(like.dtype), device=like.device)
        self._hidden: Tensor | None = None  # (B, C) at the last token read

    @property
    def log_probs(self) -> Tensor:
        return self._log_probs[:, : self._cache.length]

    @torch.no_grad()
    def score_next(self, targets: Tensor) -> Tensor:
        """(B,) log-probabilities of (B,) ids as the next token; nothing is read."""
        assert self._hidden is not None
        return score_targets(self.model, self._hidden, targets).log_probs

    @torch.no_grad()
    def read(self, tokens: Tensor, *, nudges: Tensor | None = None) -> Tensor:
        """Read (B, T) more tokens; returns the (B, S) log-probabilities of all.

        Args:
            nudges: (B, T), added to what is fed back of these tokens (to each component of it).
        """
        for t in range(tokens.size(1)):
            token = tokens[:, t]  # (B,)
            at = self._cache.length
            if self._hidden is not None:
                scores = score_targets(self.model, self._hidden, token)
                self._log_probs[:, at] = scores.log_probs
                self._state[:, at] = self.feedback.estimates(scores, self._hidden)
            if nudges is not None:
                nudge = nudges[:, t]
                self._state[:, at] += nudge if self._state.ndim == 2 else nudge[:, None]
            modulation = self.feedback.modulation(self._state[:, : at + 1])
            hidden = self.model(
                token[:, None],
                key_bias=modulation.bias,
                key_factor=modulation.factor,
                layers=self.feedback.layers,
                hidden=None if modulation.hidden is None else modulation.hidden[:, at:],
                hidden_strength=self.feedback.hidden_strength,
                cache=self._cache,
            )
            self._hidden = hidden[:, 0]
        return self.log_probs


def left_to_right(model: GPT, tokens: Tensor, feedback: Feedback) -> Tensor:
    """The fixed point of (B, T) tokens: (B, T) log-probabilities in nats."""
    return LeftToRight(model, feedback, batch=tokens.size(0)).read(tokens).clone()


def lyapunov_exponent(
    model: GPT, tokens: Tensor, feedback: Feedback, *, starts: int = 8
) -> float | None:
    """Growth rate, per token, of a small disturbance of the left-to-right recursion.

    ``starts`` copies of the text are read side by side. In each, what is fed back of one token in
    the first half is moved by 1e-7 (nats, or in every component of a hidden state); the slope of
    the logarithm of the later tokens' response (root mean square over the copies) against the
    distance from the disturbance is the exponent.
    Negative: disturbances die out along the text, and estimates settle by contraction. Positive:
    they grow, and estimates settle only as the front of settled tokens walks through the text.
    (arXiv 2508.16817, 2509.21716.)

    Args:
        model: in float64, because responses are followed down to 1e-12 nats.
        tokens: (T,) ids.

    Returns:
        None where the text is too short, nothing is fed back, so that nothing responds, or there is
        no reading order.
    """
    T = len(tokens)
    if not feedback.active or not feedback.triangular or T < 16:
        return None
    at = torch.linspace(1, T // 2, starts).long().unique().tolist()
    nudges = torch.zeros(len(at) + 1, T, dtype=torch.float64, device=tokens.device)
    for row, position in enumerate(at):
        nudges[row + 1, position] = NUDGE
    reader = LeftToRight(model, feedback, batch=len(at) + 1)
    log_probs = reader.read(tokens.expand(len(at) + 1, T), nudges=nudges)
    response = (log_probs[1:] - log_probs[:1]).abs().cpu()  # (starts, T)

    distances, logs = [], []
    for distance in range(1, T // 2):
        values = [response[row, position + distance].item() for row, position in enumerate(at)]
        size = math.sqrt(sum(value * value for value in values) / len(values))
        if not math.isfinite(size) or size > LINEAR_RANGE[1]:
            break  # saturated: no longer a small disturbance
        if size < LINEAR_RANGE[0]:
            break  # lost in rounding
        distances.append(float(distance))
        logs.append(math.log(size))
    if len(logs) < 4:
        return None
    mean_x, mean_y = sum(distances) / len(distances), sum(logs) / len(logs)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(distances, logs, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in distances)
