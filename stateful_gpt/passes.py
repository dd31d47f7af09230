"""Passes of a model over a batch of texts, as the recompute loop asks for them.

What is final need not be read again: its keys and values are cached, within one recompute and,
while texts only grow, from one to the next.

Shapes: B batch, R rows of it, T tokens of a window, N evaluated positions, C width.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from stateful_gpt.feedback import Feedback
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.recompute import Said, Span
from stateful_gpt.scoring import TokenScores, score_targets

# (R, N, C) hidden states, (R, T) ids, the span they are of -> scores of tokens span.begin + 1 on
Score = Callable[[Tensor, Tensor, Span], TokenScores]


class Passes:
    """Reads the windows of one generation, each after the other.

    Attributes:
        hidden: (B, T, C) the newest hidden state of every position of the window.
    """

    def __init__(
        self, model: LanguageModel, feedback: Feedback, *, batch: int, capacity: int, cached: bool
    ) -> None:
        """``cached``: whether spans may begin behind position 0, after what is final."""
        self._model, self._feedback, self._capacity = model, feedback, capacity
        self._cache = model.new_cache(batch=batch, capacity=capacity) if cached else None
        self._rows = list(range(batch))  # of the cache, by their number in the window
        self._tokens = torch.empty(batch, 0, dtype=torch.long, device=model.device)
        shape = (batch, capacity, model.width)
        self.hidden = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._score: Score = self._score_targets

    def window(self, tokens: Tensor, kept: list[int], *, score: Score | None = None) -> None:
        """Go over to the next window, (B, T) ids; of the last one's rows only ``kept`` remain."""
        if len(kept) < len(self.hidden):
            self.hidden = self.hidden[kept]
        if self._cache is not None and self._rows != kept:
            if len(self._rows) == len(self._tokens):
                self._cache.keep(kept)
            else:  # rows had left
                self._cache = self._model.new_cache(batch=len(kept), capacity=self._capacity)
        self._tokens, self._rows = tokens, list(range(len(tokens)))
        self._score = score or self._score_targets

    def __call__(self, state: Tensor | None, span: Span) -> Said:
        if self._cache is not None and span.rows != self._rows:
            self._cache.keep([self._rows.index(row) for row in span.rows])
        self._rows = span.rows
        rows = span.rows if len(span.rows) < len(self._tokens) else slice(None)
        tokens = self._tokens[rows] if state is None else self._tokens[rows, : state.size(1)]
        if self._cache is not None:
            # a row that has slid may have set the cache back behind the front of another
            span = replace(span, begin=min(span.begin, self._cache.length))
            self._cache.length = span.begin
        begin, end = span.begin, span.end
        fed = None if state is None else state[:, :end]
        hidden = self._model.read(
            tokens[:, begin:end],
            modulation=self._feedback.modulation(fed, begin=begin),
            cache=self._cache,
        )
        self.hidden[rows, begin:end] = hidden
        scores = self._score(hidden, tokens, span)
        if begin == 0:  # nothing predicts position 0: log-probability 0, no hidden state
            scores = TokenScores(F.pad(scores.log_probs, (1, 0)), F.pad(scores.logits, (1, 0)))
            if self._feedback.shift == 1:
                hidden = F.pad(hidden, (0, 0, 1, 0))
        state = self._feedback.estimates(scores, hidden[:, : scores.log_probs.size(1)])
        return Said(state, scores.log_probs, begin=begin + (begin > 0))

    def _score_targets(self, hidden: Tensor, tokens: Tensor, span: Span) -> TokenScores:
        targets = tokens[:, span.begin + 1 : span.end + 1]
        return score_targets(self._model, hidden[:, : targets.size(1)], targets)
