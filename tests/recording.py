"""Everything that passes say, for tests to compare with what is written out.

Shapes: B batch, R rows that take part in a pass, T tokens, C width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import Watcher, Window
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.passes import Passes
from stateful_gpt.recompute import Iteration, RecomputeConfig, Recomputed, Said, Span, recompute
from stateful_gpt.scoring import TokenScores, score_targets


@dataclass(frozen=True)
class Seen:
    """One pass: what an observer sees, and what all positions had said when it was over.

    Attributes:
        log_probs: (R, T), a copy.
        shown: the very tensor that the observer was handed.
        hidden: (B, T, C), the newest of every position that this window has evaluated.
        state: (R, T, ...) what the pass said, before it was merged; None in a generation.
    """

    number: int
    span: Span
    log_probs: Tensor
    shown: Tensor
    step_max: Tensor | None
    step_rms: Tensor | None
    hidden: Tensor
    state: Tensor | None = None


def seen(iteration: Iteration, hidden: Tensor, state: Tensor | None = None) -> Seen:
    return Seen(
        iteration.number,
        iteration.span,
        iteration.log_probs.clone(),
        iteration.log_probs,
        iteration.step_max,
        iteration.step_rms,
        hidden.clone(),
        state,
    )


@dataclass
class Recording:
    """Every pass over every window of a generation: what to hand to it as ``watch``."""

    model: LanguageModel
    windows: list[Window] = field(default_factory=list)
    passes: list[list[Seen]] = field(default_factory=list)

    def __call__(self, window: Window) -> Watcher:
        here: list[Seen] = []
        self.windows.append(window)
        self.passes.append(here)
        newest = torch.zeros(*window.tokens.shape, self.model.width, dtype=self.model.dtype)

        def score(hidden: Tensor, tokens: Tensor, span: Span) -> TokenScores:
            newest[span.rows, span.begin : span.end] = hidden
            targets = tokens[:, span.begin + 1 : span.end + 1]
            return score_targets(self.model, hidden[:, : targets.size(1)], targets)

        return Watcher(lambda iteration: here.append(seen(iteration, newest)), score)


@dataclass(frozen=True)
class Read:
    """What one pass over whole texts says: (B, T, ...), (B, T) and (B, T, C)."""

    state: Tensor
    log_probs: Tensor
    hidden: Tensor


def one_pass(
    model: LanguageModel, tokens: Tensor, feedback: Feedback
) -> Callable[[Tensor | None], Read]:
    """A pass over all of (B, T) tokens, given any state."""

    def run(state: Tensor | None) -> Read:
        passes = _passes(model, tokens, feedback)
        count, end = tokens.shape
        said = passes(state, Span(list(range(count)), 0, end, [end] * count))
        return Read(said.state, said.log_probs, passes.hidden)

    return run


def trajectory(
    model: LanguageModel,
    tokens: Tensor,
    feedback: Feedback,
    config: RecomputeConfig,
    *,
    lengths: Sequence[int] | None = None,
) -> tuple[Recomputed, list[Seen]]:
    """The passes of one recompute of (B, T) tokens."""
    passes = _passes(model, tokens, feedback, cached=config.skips_what_is_final)
    said: list[Said] = []
    record: list[Seen] = []

    def run(state: Tensor | None, span: Span) -> Said:
        said.append(passes(state, span))
        return said[-1]

    def observe(iteration: Iteration) -> None:
        record.append(seen(iteration, passes.hidden, said[-1].state))

    result = recompute(
        run,
        config=config,
        lengths=lengths or [tokens.size(1)] * len(tokens),
        triangular=feedback.triangular,
        inert=not feedback.active,
        observe=observe,
    )
    return result, record


def _passes(
    model: LanguageModel, tokens: Tensor, feedback: Feedback, *, cached: bool = False
) -> Passes:
    batch, capacity = tokens.shape
    cached = cached and feedback.triangular
    passes = Passes(model, feedback, batch=batch, capacity=capacity, cached=cached)
    passes.window(tokens, list(range(batch)))
    return passes
