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
from torch.nn.utils.rnn import pad_sequence

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
    """How the next token is drawn from the last pass."""

    temperature: float | None = None  # divides the logits; None draws the most likely token
    top_k: int | None = None  # only the k most likely tokens can be drawn; None for all
    # ids from here on cannot be drawn: padding of the embedding decodes to nothing
    vocab_size: int | None = None
    end_tokens: Collection[int] = ()  # any of them ends a text when drawn, itself included


@dataclass(frozen=True)
class Window:
    """The tokens that a generation step recomputes, right-padded to one length."""

    step: int  # tokens generated so far
    rows: list[int]  # which of the given prompts are still being continued
    starts: list[int]  # position of each row's first token; above 0 once the text was cropped
    lengths: list[int]
    tokens: Tensor  # (B, T) ids
    plain_first: bool  # whether the first pass feeds nothing back: it is the plain model's


@dataclass(frozen=True)
class Watcher:
    """Sees the passes over one window."""

    observe: Callable[[Iteration], None]  # called after every pass
    score: Score | None = None  # scores the tokens of every pass, in place of the plain way


@dataclass(frozen=True)
class Generation:
    """What became of the prompts; one entry each.

    Log-probabilities (nats) and estimates are each token's newest: one that the window has left
    behind keeps the last that it had. A text whose estimates diverged ends there.
    """

    tokens: list[list[int]]  # prompt and generated ids
    log_probs: list[Tensor]  # (T,)
    estimates: list[Tensor]  # (T,) or (T, width of the state): the next call's ``previous``
    outcomes: list[list[Outcome]]  # of each generation step's recompute
    ended: list[bool]  # whether an end token was drawn


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
            ended with. A carried estimate moves along when the window slides, except that nothing
            predicts the window's first token: it has probability 1, and no hidden state.
        previous: estimates of the prompts' tokens from an earlier call, in place of probability 1.
        sampling: default: greedily, without an end.
        generators: on the model's device; one, or one for each prompt, which then draws the same
            whatever prompts it is with.
        slide: how many tokens the window drops at once when it is full; 1 is nanoGPT's cropping.
            A window that has slid is recomputed whole, one that has grown is not.
        watch: called before each recompute; what it returns sees the passes, in inference mode.
        on_token: called with (row, id) as each token is drawn.

    Raises:
        ValueError: an empty prompt, ids outside the model's embedding, or settings that do not fit
            the prompts, the feedback or each other.
    """
    sampling = sampling or Sampling()
    if config.window is not None and not feedback.triangular:
        raise ValueError(
            "a windowed recompute needs estimates that become final from left to right: the shift"
            " of hidden states must be 1, got 0"
        )
    if slide < 1:
        raise ValueError(f"slide must be at least 1, got {slide}")
    if isinstance(generators, Sequence) and len(generators) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many generators, got {len(generators)}")
    _check(prompts, previous, model.vocab_size)
    texts = _Texts(prompts, model, feedback, max_new_tokens=max_new_tokens, previous=previous)
    passes = Passes(
        model,
        feedback,
        batch=len(prompts),
        capacity=min(model.block_size, texts.tokens.size(1)),
        cached=feedback.triangular and config.skips_what_is_final,
    )
    rows = kept = list(range(len(prompts)))
    for step in range(max_new_tokens + 1):
        last = step == max_new_tokens
        carried = previous is not None if step == 0 else start is Start.CARRIED
        window = texts.window(
            rows, step=step, block=model.block_size, slide=slide, plain_first=not carried
        )
        passes.window(window.tokens, kept)
        watcher = watch(window) if watch is not None else None
        if watcher is not None and watcher.score is not None:
            passes.score = watcher.score
        result = recompute(
            passes,
            config=config,
            lengths=window.lengths,
            start=texts.of(window, texts.estimates) if carried else None,
            log_probs=texts.of(window, texts.log_probs) if carried else None,
            settled=[texts.settled[row] for row in rows] if carried and step > 0 else None,
            triangular=feedback.triangular,
            inert=not feedback.active,
            output_too=not last,
            # what rows have cached is wanted again where the next step carries on
            leave=start is Start.COLD or last,
            observe=None if watcher is None else watcher.observe,
        )
        texts.take(window, result)
        kept = [i for i, row in enumerate(rows) if texts.goes_on(row)]
        rows = [rows[i] for i in kept]
        if last or not rows:
            break
        hidden = passes.hidden[kept, [window.lengths[i] - 1 for i in kept]]  # (B, C)
        logits = model.logits(hidden).to(texts.log_probs.dtype)  # (B, V)
        if isinstance(generators, Sequence):
            pairs = zip(logits.split(1), rows, strict=True)
            drawn = torch.cat([draw(one, sampling, generators[row]) for one, row in pairs])  # (B,)
        else:
            drawn = draw(logits, sampling, generators)
        scores = score_logits(logits, drawn)
        # with a shift of 0 the tokens' own hidden states are not known yet
        fed = hidden if feedback.shift else torch.zeros_like(hidden)
        texts.append(rows, drawn, feedback.estimates(scores, fed), scores.log_probs)
        for row in rows:
            token = texts.ids[row][-1]
            texts.ended[row] = token in sampling.end_tokens
            if on_token is not None:
                on_token(row, token)
    log_probs, estimates = texts.split(texts.log_probs), texts.split(texts.estimates)
    return Generation(texts.ids, log_probs, estimates, texts.outcomes, texts.ended)


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


class _Texts:
    """Texts and their newest estimates, with room for all the tokens to come: nothing grows.

    Attributes:
        starts: the first token of each text's window.
        settled: leading positions of the window whose estimates are final.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        model: LanguageModel,
        feedback: Feedback,
        *,
        max_new_tokens: int,
        previous: Sequence[Tensor] | None,
    ) -> None:
        like = torch.empty(0, model.width, dtype=model.dtype, device=model.device)
        count, room = len(prompts), max(map(len, prompts)) + max_new_tokens
        self.ids = [list(prompt) for prompt in prompts]
        self.tokens = torch.zeros(count, room, dtype=torch.long, device=like.device)
        self.estimates = feedback.blank(count, room, like=like)
        self.log_probs = torch.zeros(count, room, dtype=wide(like.dtype), device=like.device)
        for row, ids in enumerate(self.ids):
            self.tokens[row, : len(ids)] = torch.tensor(ids)
            if previous is not None:
                self.estimates[row, : len(ids)] = previous[row]
        self.starts, self.settled, self.ended = [0] * count, [1] * count, [False] * count
        self.outcomes: list[list[Outcome]] = [[] for _ in prompts]

    def window(
        self, rows: list[int], *, step: int, block: int, slide: int, plain_first: bool
    ) -> Window:
        """The last tokens of each of these rows, ``block`` at most."""
        # a crop drops ``slide`` tokens at once, but never so many that none is left
        slide = min(slide, block)
        for row in rows:
            begin = -(-max(0, len(self.ids[row]) - block) // slide) * slide
            if begin != self.starts[row]:  # it has lost its first token, and with it what was final
                self.starts[row], self.settled[row] = begin, 1
        starts = [self.starts[row] for row in rows]
        lengths = [len(self.ids[row]) - self.starts[row] for row in rows]
        return Window(step, rows, starts, lengths, self._cut(rows, self.tokens), plain_first)

    def of(self, window: Window, values: Tensor) -> Tensor:
        """(B, T, ...) values of a window's tokens so far; of its first token nothing is known."""
        state = self._cut(window.rows, values)
        state[:, 0] = 0.0
        return state

    def _cut(self, rows: list[int], values: Tensor) -> Tensor:
        """A copy of the windows of these rows, zeros behind the shorter ones."""
        parts = [values[row, self.starts[row] : len(self.ids[row])] for row in rows]
        return pad_sequence(parts, batch_first=True)

    def take(self, window: Window, result: Recomputed) -> None:
        """What a recompute of a window has found."""
        for i, (row, begin) in enumerate(zip(window.rows, window.starts, strict=True)):
            end = begin + window.lengths[i]
            self.estimates[row, begin:end] = result.state[i, : end - begin]
            self.log_probs[row, begin:end] = result.log_probs[i, : end - begin]
            self.outcomes[row].append(result.outcomes[i])
            self.settled[row] = result.settled[i]

    def goes_on(self, row: int) -> bool:
        return not self.ended[row] and self.outcomes[row][-1] is not Outcome.DIVERGED

    def append(self, rows: list[int], drawn: Tensor, estimates: Tensor, log_probs: Tensor) -> None:
        """One more token of each row, with what the model said of it when it was drawn."""
        at = [len(self.ids[row]) for row in rows]
        self.tokens[rows, at] = drawn
        self.estimates[rows, at] = estimates
        self.log_probs[rows, at] = log_probs
        for row, token in zip(rows, drawn.tolist(), strict=True):
            self.ids[row].append(token)

    def split(self, values: Tensor) -> list[Tensor]:
        """Of each text, on the CPU."""
        with torch.inference_mode(False):  # the caller may do anything with them
            return [values[row, : len(ids)].cpu().clone() for row, ids in enumerate(self.ids)]


def _check(
    prompts: Sequence[Sequence[int]], previous: Sequence[Tensor] | None, vocab_size: int
) -> None:
    for ids in prompts:
        if not ids:
            raise ValueError("a prompt must have at least one token")
        worst = max(ids) if min(ids) >= 0 else min(ids)
        if not 0 <= worst < vocab_size:
            raise ValueError(f"token ids must be from 0 to {vocab_size - 1}, got {worst}")
    if previous is not None and list(map(len, previous)) != list(map(len, prompts)):
        raise ValueError("previous must hold one estimate for every token of every prompt")
