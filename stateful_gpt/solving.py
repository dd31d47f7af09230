"""How the passes of a generation are computed: what a solver is asked for, and the reference.

Shapes: B batch, T tokens of a window, C n_embd, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stateful_gpt.feedback import Feedback, score_tokens
from stateful_gpt.model import GPT
from stateful_gpt.recompute import Pass, RecomputeConfig, Recomputed, Said


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the last pass.

    Attributes:
        temperature: divides the logits; None draws greedily, the most likely token.
        top_k: only the k most likely tokens can be drawn; None for all.
        vocab_size: ids from here on cannot be drawn (padding of the embedding decodes to nothing).
        end_token: ends a text when drawn, itself included; None for a text without end.
    """

    temperature: float | None = None
    top_k: int | None = None
    vocab_size: int | None = None
    end_token: int | None = None


@dataclass(frozen=True)
class Window:
    """The tokens that a generation step recomputes, right-padded to one length.

    Attributes:
        step: tokens generated so far.
        rows: which of the given prompts are still being continued.
        starts: absolute position of each row's first token; above 0 once the text was cropped.
        lengths: tokens of each row.
        tokens: (B, T) ids.
    """

    step: int
    rows: list[int]
    starts: list[int]
    lengths: list[int]
    tokens: Tensor


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """One id a row from (B, V) logits: (B,), as nanoGPT draws them.

    Of logits that are not numbers any id is drawn: its estimate is none either, and ends the text.
    """
    if sampling.vocab_size is not None and sampling.vocab_size < logits.size(1):
        logits = logits[:, : sampling.vocab_size]
    if sampling.temperature is None:
        return logits.argmax(dim=1)
    # in double and from the largest down: a tiny temperature must not overflow
    scaled = (logits - logits.amax(dim=1, keepdim=True)).double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.size(1):
        smallest = scaled.topk(sampling.top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    probabilities = scaled.softmax(dim=1).to(logits.dtype)
    # multinomial would raise, and on CUDA take the device down with it
    probabilities = probabilities.masked_fill(probabilities.isnan(), 1.0)
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(1)


@dataclass(frozen=True)
class Continuation:
    """How a text may go on without a window for each token.

    Attributes:
        most: tokens that are drawn at most.
        tell: called with each token, perhaps a few at a time.
    """

    most: int
    sampling: Sampling
    generator: torch.Generator | None
    tell: Callable[[int], None]


@dataclass(frozen=True)
class Drawn:
    """Tokens drawn one after the other: (n,) ids, log-probabilities (nats) and estimates."""

    tokens: list[int]
    log_probs: Tensor
    estimates: Tensor


class PassMaker(Protocol):
    """Makes the pass over each window of one generation, in the order in which they come.

    To be derived from, for what not every maker has.
    """

    def __call__(self, window: Window, *, log_probs: Tensor, carried: bool, observed: bool) -> Pass:
        """The pass that one recompute iterates.

        Args:
            log_probs: (B, T) the newest of each token (nats).
            carried: whether the recompute begins from what the window before it ended with.
            observed: whether anybody keeps what the passes say beyond the last one.
        """
        ...

    def draw_ahead(self, window: Window, recomputed: Recomputed, how: Continuation) -> Drawn | None:
        """Draw tokens behind a window that has just been recomputed, each as a step of its own.

        Returns:
            At least one token, which the next window must follow; None where this maker has no
            faster way than a pass for each.
        """
        return None


class Solver(Protocol):
    """How the passes of a generation are computed."""

    def begin(self, model: GPT, feedback: Feedback, config: RecomputeConfig) -> PassMaker:
        """A maker of passes for one generation.

        Raises:
            ValueError: a configuration that this solver cannot follow.
        """
        ...


class Full:
    """Every pass evaluates every token of its window: the reference."""

    def begin(self, model: GPT, feedback: Feedback, config: RecomputeConfig) -> PassMaker:
        return _FullPasses(model, feedback)


class _FullPasses(PassMaker):
    def __init__(self, model: GPT, feedback: Feedback) -> None:
        self.model, self.feedback = model, feedback

    def __call__(self, window: Window, *, log_probs: Tensor, carried: bool, observed: bool) -> Pass:
        return token_pass(self.model, window.tokens, self.feedback)


def token_pass(model: GPT, tokens: Tensor, feedback: Feedback) -> Pass:
    """A pass over (B, T) tokens as the recompute loop sees it; its output are hidden states."""

    def run(estimates: Tensor | None) -> Said:
        modulation = feedback.modulation(estimates)
        hidden = model(
            tokens,
            key_bias=modulation.bias,
            key_factor=modulation.factor,
            layers=feedback.layers,
            hidden=modulation.hidden,
            hidden_strength=feedback.hidden_strength,
        )
        scores = score_tokens(model, hidden, tokens)
        state = feedback.state(scores, hidden)
        return Said(state=state, log_probs=scores.log_probs, output=hidden)

    return run
