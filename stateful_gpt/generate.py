"""The modified ``generate``: recompute the estimates of all tokens, draw one, and again.

With no new tokens asked for, this is the study of a given text. ``stateful_gpt.cli`` is its
command line.

Shapes: B batch, T tokens of a window, C width, V vocabulary.
"""

if __name__ == "__main__":  # first: --help need not wait for torch
    import sys

    from stateful_gpt.cli import main

    sys.exit(main())

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from stateful_gpt.feedback import Feedback
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.passes import Passes, Score
from stateful_gpt.recompute import Iteration, Outcome, RecomputeConfig, Recomputed, recompute
from stateful_gpt.scoring import score_logits, wide


class Start(Enum):
    """What the passes of a generation step begin from."""

    COLD = "cold"
    CARRIED = "carried"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the last pass.

    Attributes:
        temperature: divides the logits; None draws greedily, the most likely token.
        top_k: only the k most likely tokens can be drawn; None for all.
        vocab_size: ids from here on cannot be drawn (padding of the embedding decodes to nothing).
        end_tokens: any of them ends a text when drawn, itself included; none: a text without end.
    """

    temperature: float | None = None
    top_k: int | None = None
    vocab_size: int | None = None
    end_tokens: Collection[int] = ()


@dataclass(frozen=True)
class Window:
    """The tokens that a generation step recomputes, right-padded to one length.

    Attributes:
        step: tokens generated so far.
        rows: which of the given prompts are still being continued.
        starts: absolute position of each row's first token; above 0 once the text was cropped.
        lengths: tokens of each row.
        tokens: (B, T) ids.
        plain_first: whether the first pass feeds nothing back: it is the plain model's.
    """

    step: int
    rows: list[int]
    starts: list[int]
    lengths: list[int]
    tokens: Tensor
    plain_first: bool


@dataclass(frozen=True)
class Watcher:
    """Sees the passes over one window: each record, and before it the hidden states it comes from.

    Attributes:
        observe: called after every pass.
        score: scores the tokens in every pass, in place of the plain way; None leaves that alone.
    """

    observe: Callable[[Iteration], None]
    score: Score | None = None


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


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    feedback: Feedback,
    config: RecomputeConfig,
    start: Start = Start.COLD,
    previous: Sequence[Tensor] | None = None,
    sampling: Sampling | None = None,
    generators: Sequence[torch.Generator] | torch.Generator | None = None,
    slide: int = 1,
    watch: Callable[[Window], Watcher | None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continue prompts, feeding the estimates of all tokens back at every step.

    At every step the last ``block_size`` tokens are recomputed as ``config`` says, and the next
    token is drawn from the last pass. One more recompute follows each text's last token, so that
    the estimates returned are those of the whole text.

    Args:
        prompts: ids of each prompt, at least one; lengths may differ.
        start: whether a step begins from probability 1 everywhere, or from what the step before
            ended with. A carried estimate moves along when the window slides, except that the
            window's first token has probability 1, and no hidden state: nothing predicts it.
        previous: estimates of the prompts' tokens from an earlier call, in place of probability 1.
        sampling: default: greedily, without an end.
        generators: on the model's device; one, or one for each prompt, which then draws the same
            whatever prompts it is with.
        slide: how many tokens the window drops at once when it is full; 1 is nanoGPT's cropping.
            A window that has slid is recomputed whole, one that has grown is not.
        watch: called before each recompute; what it returns sees the passes, in inference mode.
        on_token: called with (row, id) as each token is drawn.

    Raises:
        ValueError: an empty prompt, ids outside the model's embedding, ``previous`` of other
            lengths than the prompts, another number of ``generators``, a ``slide`` below 1, or a
            recompute that the feedback does not allow.
    """
    sampling = sampling or Sampling()
    texts = [list(prompt) for prompt in prompts]
    if config.window is not None and not feedback.triangular:
        raise ValueError(
            "a windowed recompute needs estimates that become final from left to right: the shift"
            " of hidden states must be 1, got 0"
        )
    _check(texts, previous, model.vocab_size)
    if slide < 1:
        raise ValueError(f"slide must be at least 1, got {slide}")
    if isinstance(generators, Sequence) and len(generators) != len(texts):
        raise ValueError(f"{len(texts)} prompts need as many generators, got {len(generators)}")
    so_far = _SoFar(texts, model, feedback, max_new_tokens=max_new_tokens, previous=previous)
    longest = min(model.block_size, so_far.tokens.size(1))
    passes = Passes(
        model,
        feedback,
        batch=len(texts),
        capacity=longest,
        cached=feedback.triangular and config.skips_what_is_final,
    )
    outcomes: list[list[Outcome]] = [[] for _ in texts]
    ended = [False] * len(texts)
    settled = [1] * len(texts)  # leading positions of the window whose estimates are final
    rows = kept = list(range(len(texts)))
    starts = [0] * len(texts)
    for step in range(max_new_tokens + 1):
        carried = previous is not None if step == 0 else start is Start.CARRIED
        window = so_far.window(
            rows, step=step, block=model.block_size, slide=slide, plain_first=not carried
        )
        for row, begin in zip(rows, window.starts, strict=True):
            if begin != starts[row]:  # it has lost its first token, and with it what was final
                starts[row], settled[row] = begin, 1
        passes.window(window.tokens, kept)
        watcher = watch(window) if watch is not None else None
        if watcher is not None and watcher.score is not None:
            passes.score = watcher.score
        result = recompute(
            passes,
            config=config,
            lengths=window.lengths,
            start=so_far.of(window, so_far.estimates) if carried else None,
            log_probs=so_far.of(window, so_far.log_probs) if carried else None,
            settled=[settled[row] for row in rows] if carried and step > 0 else None,
            triangular=feedback.triangular,
            inert=not feedback.active,
            output_too=step < max_new_tokens,
            # what rows have cached is wanted again where the next step carries on
            leave=start is Start.COLD or step == max_new_tokens,
            observe=None if watcher is None else watcher.observe,
        )
        so_far.take(window, result)
        kept = []
        for i, row in enumerate(rows):
            outcomes[row].append(result.outcomes[i])
            settled[row] = result.settled[i]
            if not ended[row] and result.outcomes[i] is not Outcome.DIVERGED:
                kept.append(i)
        rows = [rows[i] for i in kept]
        if step == max_new_tokens or not rows:
            break
        at = [window.lengths[i] - 1 for i in kept]
        hidden = passes.hidden[kept, at]  # (B, C)
        logits = model.logits(hidden).to(so_far.log_probs.dtype)  # (B, V)
        if isinstance(generators, Sequence):
            pairs = zip(logits.split(1), rows, strict=True)
            drawn = torch.cat([draw(one, sampling, generators[row]) for one, row in pairs])  # (B,)
        else:
            drawn = draw(logits, sampling, generators)
        scores = score_logits(logits, drawn)
        so_far.append(rows, drawn, feedback.estimates(scores, hidden), scores.log_probs)
        for row in rows:
            token = texts[row][-1]
            ended[row] = token in sampling.end_tokens
            if on_token is not None:
                on_token(row, token)
    return Generation(
        texts, so_far.split(so_far.log_probs), so_far.split(so_far.estimates), outcomes, ended
    )


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


class _SoFar:
    """Texts and their newest estimates, with room for all the tokens to come: nothing grows."""

    def __init__(
        self,
        texts: list[list[int]],
        model: LanguageModel,
        feedback: Feedback,
        *,
        max_new_tokens: int,
        previous: Sequence[Tensor] | None,
    ) -> None:
        like = torch.empty(0, model.width, dtype=model.dtype, device=model.device)
        room = (len(texts), max(len(text) for text in texts) + max_new_tokens)
        self.texts = texts
        self.tokens = torch.zeros(room, dtype=torch.long, device=like.device)
        self.estimates = feedback.blank(*room, like=like)
        self.log_probs = torch.zeros(room, dtype=wide(like.dtype), device=like.device)
        for row, text in enumerate(texts):
            self.tokens[row, : len(text)] = torch.tensor(text)
            if previous is not None:
                self.estimates[row, : len(text)] = previous[row]

    def window(
        self, rows: list[int], *, step: int, block: int, slide: int, plain_first: bool
    ) -> Window:
        """The last tokens of each of these rows, ``block`` at most."""
        counts = [len(self.texts[row]) for row in rows]
        # a crop drops ``slide`` tokens at once, but never so many that none is left
        slide = min(slide, block)
        starts = [-(-max(0, count - block) // slide) * slide for count in counts]
        lengths = [count - begin for count, begin in zip(counts, starts, strict=True)]
        tokens = self._cut(rows, starts, lengths, self.tokens)
        return Window(step, list(rows), starts, lengths, tokens, plain_first)

    def of(self, window: Window, values: Tensor) -> Tensor:
        """(B, T, ...) values of a window's tokens so far; of its first token nothing is known."""
        state = self._cut(window.rows, window.starts, window.lengths, values)
        state[:, 0] = 0.0
        return state

    def take(self, window: Window, result: Recomputed) -> None:
        """The newest estimates of a window's tokens."""
        for i, (row, begin) in enumerate(zip(window.rows, window.starts, strict=True)):
            end = begin + window.lengths[i]
            self.estimates[row, begin:end] = result.state[i, : end - begin]
            self.log_probs[row, begin:end] = result.log_probs[i, : end - begin]

    def append(self, rows: list[int], drawn: Tensor, estimates: Tensor, log_probs: Tensor) -> None:
        """One more token of each row, with what the model said of it when it was drawn."""
        for i, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            at = len(self.texts[row])
            self.texts[row].append(token)
            self.tokens[row, at] = token
            self.estimates[row, at] = estimates[i]
            self.log_probs[row, at] = log_probs[i]

    def split(self, values: Tensor) -> list[Tensor]:
        """Of each text, on the CPU."""
        with torch.inference_mode(False):  # the caller may do anything with them
            return [values[row, : len(text)].cpu().clone() for row, text in enumerate(self.texts)]

    def _cut(
        self, rows: list[int], starts: list[int], lengths: list[int], values: Tensor
    ) -> Tensor:
        """A copy of a window's part of (B, N, ...) values, zeros behind the shorter rows."""
        if len(rows) == 1:
            return values[rows[0], starts[0] : starts[0] + lengths[0]][None].clone()
        part = values.new_zeros(len(rows), max(lengths), *values.shape[2:])
        for i, (row, begin, length) in enumerate(zip(rows, starts, lengths, strict=True)):
            part[i, :length] = values[row, begin : begin + length]
        return part


def _check(texts: list[list[int]], previous: Sequence[Tensor] | None, vocab_size: int) -> None:
    for text in texts:
        if not text:
            raise ValueError("a prompt must have at least one token")
        worst = max(text) if min(text) >= 0 else min(text)
        if not 0 <= worst < vocab_size:
            raise ValueError(f"token ids must be from 0 to {vocab_size - 1}, got {worst}")
    if previous is not None and [len(p) for p in previous] != [len(text) for text in texts]:
        raise ValueError("previous must hold one estimate for every token of every prompt")
