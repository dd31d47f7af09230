"""The modified ``generate``: recompute the estimates of all tokens, draw one, and again.

With no new tokens asked for, this is the study of a given text. ``stateful_gpt.cli`` is its
command line.

Shapes: B batch, T tokens of a window, C n_embd, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from stateful_gpt.feedback import (
    Feedback,
    score_logits,
    wide,
)
from stateful_gpt.model import GPT
from stateful_gpt.recompute import (
    Iteration,
    Outcome,
    RecomputeConfig,
    Said,
    recompute,
)
from stateful_gpt.solving import Continuation, Drawn, Full, Sampling, Solver, Window, draw
from stateful_gpt.stepping import next_logits


class Start(Enum):
    """What the passes of a generation step begin from."""

    COLD = "cold"
    CARRIED = "carried"


@dataclass(frozen=True)
class Generation:
    """What became of the prompts; one entry each.

    Attributes:
        tokens: prompt and generated ids.
        log_probs: the newest estimate of every token (nats). A token that the window has left
            behind keeps the last one it had.
        estimates: what is fed back of every token, (T,) or (T, width of the feedback's state): hand
            it to the next call as ``previous``.
        outcomes: how each generation step's recompute ended.
        ended: whether the end token was drawn. A text whose estimates diverged ends there, too:
            its last outcome says so.
    """

    tokens: list[list[int]]
    log_probs: list[Tensor]
    estimates: list[Tensor]
    outcomes: list[list[Outcome]]
    ended: list[bool]


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    feedback: Feedback,
    config: RecomputeConfig,
    solver: Solver | None = None,
    start: Start = Start.COLD,
    previous: Sequence[Tensor] | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    on_window: Callable[[Window], Callable[[Iteration], None] | None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continue prompts, feeding the estimates of all tokens back at every step.

    At every step the last ``block_size`` tokens are recomputed as ``config`` says, and the next
    token is drawn from the last pass. One more recompute follows each text's last token, so that
    the estimates returned are those of the whole text.

    Args:
        prompts: ids of each prompt, at least one; lengths may differ.
        solver: how passes are computed; default: every pass evaluates every token.
        start: whether a step begins from probability 1 everywhere, or from what the step before
            ended with. A carried estimate moves along when the window slides, except that the
            window's first token has probability 1, and no hidden state: nothing predicts it.
        previous: estimates of the prompts' tokens from an earlier call, in place of probability 1.
        sampling: default: greedily, without an end.
        generator: on the model's device; needed to draw reproducibly.
        on_window: called before each recompute; what it returns observes the passes.
        on_token: called with (row, id) as each token is drawn; on a GPU perhaps a few at a time.

    Raises:
        ValueError: an empty prompt, ids outside the model's embedding, ``previous`` of other
            lengths than the prompts, or a configuration that the solver cannot follow.
    """
    sampling = sampling or Sampling()
    block = model.config.block_size
    texts = [list(prompt) for prompt in prompts]
    _check(texts, previous, vocab_size=model.config.vocab_size)
    so_far = _SoFar(texts, model, feedback, max_new_tokens=max_new_tokens, previous=previous)
    outcomes: list[list[Outcome]] = [[] for _ in texts]
    ended = [False] * len(texts)
    settled = [1] * len(texts)  # leading positions of the window whose estimates are final
    make_pass = (solver or Full()).begin(model, feedback, config)
    rows = list(range(len(texts)))
    step = 0
    while True:
        window = so_far.window(rows, step=step, block=block)
        carried = previous is not None if step == 0 else start is Start.CARRIED
        observe = on_window(window) if on_window is not None else None
        result = recompute(
            make_pass(
                window,
                log_probs=so_far.of(window, so_far.log_probs),
                carried=carried and step > 0,
                observed=observe is not None,
            ),
            config=config,
            lengths=window.lengths,
            start=so_far.of(window, so_far.estimates) if carried else None,
            settled=[settled[row] for row in rows] if carried and step > 0 else None,
            triangular=feedback.triangular,
            output_too=step < max_new_tokens,
            observe=observe,
        )
        for i, row in enumerate(rows):
            outcomes[row].append(result.outcomes[i])
            # a window about to slide loses its first token, and with it what was final
            settled[row] = result.settled[i] if window.lengths[i] < block else 1
        so_far.take(window, result.said)
        going_on = [
            i
            for i, row in enumerate(rows)
            if not ended[row] and outcomes[row][-1] is not Outcome.DIVERGED
        ]
        rows = [rows[i] for i in going_on]
        if step == max_new_tokens or not rows:
            break
        ahead = None
        if on_window is None and start is Start.CARRIED:
            tell = partial(on_token, rows[0]) if on_token is not None else _tell_nobody
            how = Continuation(max_new_tokens - step, sampling, generator, tell)
            ahead = make_pass.draw_ahead(window, result, how)
        if ahead is not None:
            (row,), count = rows, len(ahead.tokens)
            so_far.extend(row, ahead)
            ended[row] = ahead.tokens[-1] == sampling.end_token
            # all but the last token have been through their recompute, and ended like this one
            outcomes[row] += outcomes[row][-1:] * (count - 1)
            settled[row] += count - 1
            step += count
            continue
        at = [window.lengths[i] - 1 for i in going_on]
        hidden = result.said.output[going_on, at]  # (B, C)
        logits = next_logits(model, hidden)  # (B, V)
        drawn = draw(logits, sampling, generator)  # (B,)
        scores = score_logits(logits, drawn)
        so_far.append(rows, drawn, feedback.estimates(scores, hidden), scores.log_probs)
        step += 1
        for row in rows:
            token = texts[row][-1]
            ended[row] = token == sampling.end_token
            if on_token is not None:
                on_token(row, token)
    return Generation(
        texts, so_far.split(so_far.log_probs), so_far.split(so_far.estimates), outcomes, ended
    )


class _SoFar:
    """Texts and their newest estimates, with room for all the tokens to come: nothing grows."""

    def __init__(
        self,
        texts: list[list[int]],
        model: GPT,
        feedback: Feedback,
        *,
        max_new_tokens: int,
        previous: Sequence[Tensor] | None,
    ) -> None:
        like = model.lm_head.weight[:0]
        room = (len(texts), max(len(text) for text in texts) + max_new_tokens)
        self.texts = texts
        self.tokens = torch.zeros(room, dtype=torch.long, device=like.device)
        self.estimates = feedback.blank(*room, like=like)
        self.log_probs = torch.zeros(room, dtype=wide(like.dtype), device=like.device)
        for row, text in enumerate(texts):
            self.tokens[row, : len(text)] = torch.tensor(text)
            if previous is not None:
                self.estimates[row, : len(text)] = previous[row]

    def window(self, rows: list[int], *, step: int, block: int) -> Window:
        """The last ``block`` tokens of each of these rows."""
        counts = [len(self.texts[row]) for row in rows]
        lengths = [min(count, block) for count in counts]
        starts = [count - length for count, length in zip(counts, lengths, strict=True)]
        window = Window(
            step=step, rows=list(rows), starts=starts, lengths=lengths, tokens=self.tokens[:0]
        )
        return replace(window, tokens=self._cut(window, self.tokens))

    def of(self, window: Window, values: Tensor) -> Tensor:
        """(B, T, ...) values of a window's tokens so far; of its first token nothing is known."""
        state = self._cut(window, values)
        state[:, 0] = 0.0
        return state

    def take(self, window: Window, said: Said) -> None:
        """The newest estimates of a window's tokens."""
        for i, (row, begin, length) in enumerate(
            zip(window.rows, window.starts, window.lengths, strict=True)
        ):
            self.estimates[row, begin : begin + length] = said.state[i, :length]
            self.log_probs[row, begin : begin + length] = said.log_probs[i, :length]

    def append(self, rows: list[int], drawn: Tensor, estimates: Tensor, log_probs: Tensor) -> None:
        """One more token of each row, with what the model said of it when it was drawn."""
        for i, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            at = len(self.texts[row])
            self.texts[row].append(token)
            self.tokens[row, at] = token
            self.estimates[row, at] = estimates[i]
            self.log_probs[row, at] = log_probs[i]

    def extend(self, row: int, drawn: Drawn) -> None:
        """Several more tokens of one row."""
        begin, end = len(self.texts[row]), len(self.texts[row]) + len(drawn.tokens)
        self.texts[row] += drawn.tokens
        self.tokens[row, begin:end] = torch.tensor(drawn.tokens)
        self.estimates[row, begin:end] = drawn.estimates
        self.log_probs[row, begin:end] = drawn.log_probs

    def split(self, values: Tensor) -> list[Tensor]:
        """Of each text, on the CPU."""
        return [values[row, : len(text)].cpu().clone() for row, text in enumerate(self.texts)]

    def _cut(self, window: Window, values: Tensor) -> Tensor:
        """A copy of a window's part, zeros behind the shorter rows."""
        longest = max(window.lengths)
        if len(window.rows) == 1:
            begin = window.starts[0]
            return values[window.rows[0], begin : begin + longest].clone()[None]
        part = values.new_zeros(len(window.rows), longest, *values.shape[2:])
        for i, (row, begin, length) in enumerate(
            zip(window.rows, window.starts, window.lengths, strict=True)
        ):
            part[i, :length] = values[row, begin : begin + length]
        return part


def _tell_nobody(token: int) -> None:
    """Where nobody wants to hear of each token."""


def _check(texts: list[list[int]], previous: Sequence[Tensor] | None, *, vocab_size: int) -> None:
    for text in texts:
        if not text:
            raise ValueError("a prompt must have at least one token")
        worst = max(text) if min(text) >= 0 else min(text)
        if not 0 <= worst < vocab_size:
            raise ValueError(f"token ids must be from 0 to {vocab_size - 1}, got {worst}")
    if previous is not None and [len(p) for p in previous] != [len(text) for text in texts]:
        raise ValueError("previous must hold one estimate for every token of every prompt")


if __name__ == "__main__":
    import sys

    from stateful_gpt.cli import main

    sys.exit(main())
