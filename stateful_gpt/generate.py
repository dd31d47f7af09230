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
from dataclasses import dataclass, field
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

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be above 0 (None: greedy), got {self.temperature}")
        for name, count in (("top_k", self.top_k), ("vocab_size", self.vocab_size)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1 (None: all), got {count}")


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

    Log-probabilities (nats) and estimates are each token's newest: the first of a window that has
    slid, which nothing predicts any more, and those left behind keep the last that they had (0 if
    no window ever held them). A text whose estimates diverged ends there.
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

    At every step the last tokens, ``block_size`` of them at most, are recomputed as ``config``
    says, and the next one is drawn from the last pass. One more recompute follows each text's last
    token, so that the estimates returned are those of the whole text.

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
    start, sampling = Start(start), sampling or Sampling()  # a start's name is as good as itself
    if config.window is not None and not feedback.triangular:
        raise ValueError(
            "a windowed recompute needs estimates that become final from left to right: the shift"
            " of hidden states must be 1, got 0"
        )
    for name, value, least in (("slide", slide, 1), ("max_new_tokens", max_new_tokens, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if isinstance(generators, Sequence) and len(generators) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many generators, got {len(generators)}")
    _check(prompts, model.vocab_size)
    blanks = [feedback.blank(len(prompt), model=model) for prompt in prompts]
    known = blanks if previous is None else previous
    if [estimates.shape for estimates in known] != [blank.shape for blank in blanks]:
        raise ValueError(
            "previous must hold one estimate for every token of every prompt, as wide as those of"
            " this feedback"
        )
    texts = [
        _Text(list(prompt), blank.copy_(estimates), blank.new_zeros(len(prompt)))
        for prompt, blank, estimates in zip(prompts, blanks, known, strict=True)
    ]
    capacity = min(model.block_size, max(map(len, prompts)) + max_new_tokens)
    cached = feedback.triangular and config.skips_what_is_final
    passes = Passes(model, feedback, batch=len(texts), capacity=capacity, cached=cached)
    rows = kept = list(range(len(prompts)))
    for step in range(max_new_tokens + 1):
        last = step == max_new_tokens
        carried = previous is not None if step == 0 else start is Start.CARRIED
        here = [texts[row] for row in rows]
        for text in here:
            text.crop(block=model.block_size, slide=slide)
        ids = [torch.tensor(text.ids[text.begin :], device=model.device) for text in here]
        window = Window(
            step,
            rows,
            starts=[text.begin for text in here],
            lengths=list(map(len, ids)),
            tokens=pad_sequence(ids, batch_first=True),
            plain_first=not carried,
        )
        watcher = watch(window) if watch is not None else None
        passes.window(window.tokens, kept, score=None if watcher is None else watcher.score)
        result = recompute(
            passes,
            config=config,
            lengths=window.lengths,
            start=_together([text.estimates[text.begin :] for text in here]) if carried else None,
            log_probs=_together([text.log_probs[text.begin :] for text in here]),
            settled=[text.settled for text in here] if carried and step > 0 else None,
            triangular=feedback.triangular,
            inert=not feedback.active,
            output_too=not last,
            # what rows have cached is wanted again where the next step carries on
            leave=start is Start.COLD or last,
            observe=None if watcher is None else watcher.observe,
        )
        for i, text in enumerate(here):
            text.take(result, i)
        kept = [
            i
            for i, text in enumerate(here)
            if not text.ended and text.outcomes[-1] is not Outcome.DIVERGED
        ]
        rows = [rows[i] for i in kept]
        if last or not rows:
            break
        hidden = passes.hidden[kept, [window.lengths[i] - 1 for i in kept]]  # (B, C)
        logits = model.logits(hidden).to(wide(model.dtype))  # (B, V)
        if isinstance(generators, Sequence):
            pairs = zip(logits.split(1), rows, strict=True)
            drawn = torch.cat([draw(one, sampling, generators[row]) for one, row in pairs])  # (B,)
        else:
            drawn = draw(logits, sampling, generators)
        scores = score_logits(logits, drawn)
        # with a shift of 0 the tokens' own hidden states are not known yet
        fed = feedback.estimates(scores, hidden if feedback.shift else torch.zeros_like(hidden))
        for i, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            texts[row].append(token, fed[i : i + 1], scores.log_probs[i : i + 1])
            texts[row].ended = token in sampling.end_tokens
            if on_token is not None:
                on_token(row, token)
    with torch.inference_mode(False):  # the caller may do anything with them
        return Generation(
            tokens=[text.ids for text in texts],
            log_probs=[text.log_probs.cpu().clone() for text in texts],
            estimates=[text.estimates.cpu().clone() for text in texts],
            outcomes=[text.outcomes for text in texts],
            ended=[text.ended for text in texts],
        )


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """One id a row from (B, V) logits: (B,), as nanoGPT draws them.

    Of logits that are not numbers any id is drawn: its estimate is none either, and ends the text.
    """
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


@dataclass
class _Text:
    """A text of T tokens, and their newest estimates."""

    ids: list[int]
    estimates: Tensor  # (T, ...)
    log_probs: Tensor  # (T,)
    begin: int = 0  # of its window
    settled: int = 1  # leading positions of the window whose estimates are final
    outcomes: list[Outcome] = field(default_factory=list)
    ended: bool = False

    def crop(self, *, block: int, slide: int) -> None:
        """Let the window begin where it is ``block`` tokens at most."""
        slide = min(slide, block)  # so many are dropped at once, but never all
        begin = -(-max(0, len(self.ids) - block) // slide) * slide
        if begin != self.begin:  # it has lost its first token, and with it what was final
            self.begin, self.settled = begin, 1

    def take(self, result: Recomputed, i: int) -> None:
        """What a recompute of the window has found, as its row ``i``."""
        # nothing predicts the first token of a window that has slid: it keeps what it had
        first, count = int(self.begin > 0), len(self.ids) - self.begin
        kept = self.begin + first
        self.estimates = torch.cat([self.estimates[:kept], result.state[i, first:count]])
        self.log_probs = torch.cat([self.log_probs[:kept], result.log_probs[i, first:count]])
        self.outcomes.append(result.outcomes[i])
        self.settled = result.settled[i]

    def append(self, token: int, estimate: Tensor, log_prob: Tensor) -> None:
        """One more token, with what the model said of it when it was drawn."""
        self.ids.append(token)
        self.estimates = torch.cat([self.estimates, estimate])
        self.log_probs = torch.cat([self.log_probs, log_prob])


def _together(values: list[Tensor]) -> Tensor:
    """(B, T, ...) values of windows; of their first tokens nothing is known."""
    batch = pad_sequence(values, batch_first=True)
    batch[:, 0] = 0.0
    return batch


def _check(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for ids in prompts:
        if not ids:
            raise ValueError("a prompt must have at least one token")
        worst = max(ids) if min(ids) >= 0 else min(ids)
        if not 0 <= worst < vocab_size:
            raise ValueError(f"token ids must be from 0 to {vocab_size - 1}, got {worst}")
