"""The exact fixed point, read from left to right, and how a disturbance grows along the text.

The estimate of a token depends only on the estimates before it, so one evaluation in reading order
computes the fixed point that the recompute loop iterates towards.

Shapes: B batch, T tokens, S tokens read so far, C width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stateful_gpt.convergence import slope
from stateful_gpt.feedback import Feedback
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.scoring import score_targets, wide

LINEAR_RANGE = (1e-12, 1e-3)  # nats: above float64 rounding, below where a response saturates
NUDGE = 1e-7  # nats
COPIES = 8  # of a text, each disturbed at one token
SHORTEST = 16  # tokens in which growth can be told


class LeftToRight:
    """Reads texts token by token, each with the final estimates of all tokens before it.

    Every token is evaluated once, over cached keys and values: they are final when they are made.

    Raises:
        ValueError: hidden states are fed back to their own position, which have no such order.
    """

    def __init__(
        self, model: LanguageModel, feedback: Feedback, *, batch: int, capacity: int
    ) -> None:
        if not feedback.triangular:
            raise ValueError("hidden states fed back to their own position cannot be read in order")
        self._model, self._feedback = model, feedback
        self._cache = model.new_cache(batch=batch, capacity=capacity)
        self._state = feedback.blank(batch, capacity, model=model)
        self._log_probs = torch.zeros(batch, capacity, dtype=wide(model.dtype), device=model.device)
        shape = (batch, capacity, model.width)
        self._hidden = torch.zeros(shape, dtype=model.dtype, device=model.device)

    @property
    def log_probs(self) -> Tensor:
        """(B, S) nats, of the tokens read so far; 0 at position 0."""
        return self._log_probs[:, : self._cache.length]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, of which one may be named several times."""
        self._cache.keep(rows)
        self._state, self._log_probs = self._state[rows], self._log_probs[rows]
        self._hidden = self._hidden[rows]

    def set_back(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; others can be read behind them."""
        self._cache.length = length

    @torch.no_grad()
    def score_next(self, targets: Tensor) -> Tensor:
        """(B,) log-probabilities of (B,) ids as the next token after one at least; none is read."""
        before = self._hidden[:, self._cache.length - 1]
        return score_targets(self._model, before, targets).log_probs

    @torch.inference_mode()
    def read(self, tokens: Tensor, *, nudges: Tensor | None = None) -> Tensor:
        """Read (B, T) more tokens; returns the (B, S) log-probabilities of all.

        (B, T) ``nudges`` are added to what is fed back of these tokens, to each component of it.
        """
        for t in range(tokens.size(1)):
            token, at = tokens[:, t], self._cache.length
            self._state[:, at] = 0.0
            if at > 0:  # nothing predicts position 0
                before = self._hidden[:, at - 1]  # (B, C)
                scores = score_targets(self._model, before, token)
                self._log_probs[:, at] = scores.log_probs
                self._state[:, at] = self._feedback.estimates(scores, before)
            if nudges is not None:
                nudge = nudges[:, t]
                self._state[:, at] += nudge if self._state.ndim == 2 else nudge[:, None]
            modulation = self._feedback.modulation(self._state[:, : at + 1], begin=at)
            hidden = self._model.read(token[:, None], modulation=modulation, cache=self._cache)
            self._hidden[:, at] = hidden[:, 0]
        return self.log_probs


def left_to_right(model: LanguageModel, tokens: Tensor, feedback: Feedback) -> Tensor:
    """The fixed point of (B, T) tokens: (B, T) log-probabilities in nats."""
    batch, capacity = tokens.shape
    return LeftToRight(model, feedback, batch=batch, capacity=capacity).read(tokens).clone()


def disturbed_reading(
    model: LanguageModel, tokens: Tensor, feedback: Feedback, *, lengths: Sequence[int]
) -> tuple[Tensor, list[float | None]]:
    """The fixed point, and the growth rate per token of a small disturbance of its recursion.

    In each of up to 8 copies of a text, what is fed back of one token in the first half is moved by
    1e-7 (nats, or in every component of a hidden state); the slope of the logarithm of the later
    tokens' response (root mean square over the copies) against the distance from the disturbance is
    the Lyapunov exponent: the largest decide, and a typical one may grow less. Negative:
    disturbances, and rounding with them, die out along the text. Positive: they grow, and longer
    texts take more passes, at worst one a token as the front walks through the text.
    (arXiv 2508.16817, 2509.21716.)

    Args:
        model: read in float64, because responses are followed down to 1e-12 nats.
        tokens: (B, T) ids, right-padded to one length; ``lengths`` of the B texts.

    Returns:
        (B, T) log-probabilities in nats, and an exponent for each text: None where it is too short,
        or nothing is fed back, so that nothing responds.

    Raises:
        ValueError: see ``LeftToRight``.
    """
    model, (texts, T) = model.in_float64(), tokens.shape
    copies = sorted(  # of a text, disturbed at a position, and dropped half a text later
        (position, text, position + length // 2)
        for text, length in enumerate(lengths)
        if length >= SHORTEST and feedback.active
        for position in torch.linspace(1, length // 2, COPIES).long().unique().tolist()
    )
    responses: list[list[Tensor]] = [[] for _ in lengths]  # (distances,) each, a copy each
    reader = LeftToRight(model, feedback, batch=texts + len(copies), capacity=T)
    reader.keep(list(range(texts)))
    alive: list[tuple[int, int, int]] = []  # the copies in the rows behind the texts themselves
    here = 0
    for event in sorted({T, *(begin for begin, _, _ in copies), *(end for _, _, end in copies)}):
        rows = [*range(texts), *(text for _, text, _ in alive)]
        log_probs, here = reader.read(tokens[rows, here:event]), event
        going = list(range(len(alive)))
        for i, (begin, text, end) in reversed(list(enumerate(alive))):
            if end == event:
                response = log_probs[texts + i, begin + 1 :] - log_probs[text, begin + 1 :]
                responses[text].append(response.abs().cpu())
                going[i] = going[-1]  # the last one fills the gap: few rows are moved
                going.pop()
        new = [copy for copy in copies if copy[0] == event]
        reader.keep([*range(texts), *(texts + i for i in going), *(text for _, text, _ in new)])
        alive = [alive[i] for i in going] + new
        if new:
            rows = [*range(texts), *(text for _, text, _ in alive)]
            nudges = torch.zeros(len(rows), 1, dtype=torch.float64, device=tokens.device)
            nudges[-len(new) :] = NUDGE
            reader.read(tokens[rows, event : event + 1], nudges=nudges)
            here += 1
    exponents = [_growth(torch.stack(rows)) if rows else None for rows in responses]
    return reader.log_probs[:texts].clone(), exponents


def _growth(responses: Tensor) -> float | None:
    """Slope of the logarithm of the rms over copies of (copies, D) responses, by distance.

    It is fitted up to where the response saturates, or is lost in rounding.
    """
    sizes = responses.square().mean(dim=0).sqrt()  # (D,)
    linear = (sizes >= LINEAR_RANGE[0]) & (sizes <= LINEAR_RANGE[1])
    count = int(linear.long().cumprod(dim=0).sum())
    return slope(sizes[:count].log()) if count >= 4 else None
