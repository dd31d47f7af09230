"""Passes that evaluate only what can still move: from the settled front to the end of a window.

The keys and values of settled positions are cached, so that a pass costs what its few positions
cost. Between generation steps the cache stays: with carried estimates over a settled prefix, one
new token is one evaluation of one position.

The front of a row is the number of its leading estimates that will not move again. By the theorem
(see ``recompute``) every pass moves it on by one at least: of the positions from the front on, the
first that a pass moves is final then, and so is all before it.

Shapes: B batch, T tokens of a window, N estimates that a pass makes, C n_embd.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stateful_gpt.continuing import continue_text
from stateful_gpt.feedback import Feedback, TokenScores, score_targets
from stateful_gpt.model import GPT, Cache
from stateful_gpt.recompute import Front, Moved, Pass, RecomputeConfig, Recomputed, Said
from stateful_gpt.solving import Continuation, Drawn, PassMaker, Window
from stateful_gpt.stepping import Stepper, covers
from stateful_gpt.widths import CPU, GPU, Width

# An estimate that moved by no more than this many roundings has not moved: the same sums in
# matrices of another shape differ by as much.
ROUNDINGS = 16


@dataclass(frozen=True)
class Windowed:
    """Evaluates a window of positions from the settled front on.

    A position is settled by the theorem, when it moves no further than rounding behind settled
    ones, and, where ``RecomputeConfig.tolerance`` is larger than that, when it moves no further
    than the tolerance. The fixed point is that of the full recompute: in float64 to 1e-10 nats
    while the tolerance is 0, in float32 to 1e-3 nats wherever rounding is not amplified along the
    text (a negative Lyapunov exponent). So is the outcome, but for a last step that is rounding and
    not 0: it is final here, and one step short of final there.

    The last allowed pass over a window reads to its end, and so does the first that somebody
    observes: no token is drawn from, and nothing reported of, a position that was never evaluated
    (unless the text diverged before it). Estimates ahead of a pass keep the value they had.

    Attributes:
        window: positions that a pass evaluates from the front on. 1 reads from left to right;
            ``all`` reads to the end, which is the full recompute pass by pass; ``auto`` takes a
            width that suits model and device, wider while much of it settles and 1 where the front
            walks (see ``Width``).
    """

    window: int | Literal["all", "auto"] = "auto"

    def __post_init__(self) -> None:
        number = isinstance(self.window, int) and not isinstance(self.window, bool)
        if not (self.window in ("all", "auto") or (number and int(self.window) >= 1)):
            raise ValueError(
                f"window must be all, auto or a whole number of at least 1, got {self.window!r}"
            )

    def begin(self, model: GPT, feedback: Feedback, config: RecomputeConfig) -> PassMaker:
        if config.damping != 1.0:
            raise ValueError(
                "a windowed recompute is undamped, as damped estimates never are final: damping"
                f" must be 1, got {config.damping}"
            )
        if not feedback.triangular:
            raise ValueError(
                "a windowed recompute needs estimates that become final from left to right: the"
                " shift of hidden states must be 1, got 0"
            )
        return _WindowedPasses(model, feedback, config, self.window)


@dataclass
class _Text:
    """Where one row of the batch stands."""

    row: int
    start: int  # of its window
    width: Width
    front: int = 1  # keys and values of the positions before front - 1 are cached
    exact: bool = True


class _WindowedPasses(PassMaker):
    """The passes of one generation, and what they share: the cache, and the front of each row."""

    def __init__(
        self,
        model: GPT,
        feedback: Feedback,
        config: RecomputeConfig,
        window: int | Literal["all", "auto"],
    ) -> None:
        self.model = model
        self.feedback = feedback
        self.config = config
        self.window = window
        self.lean = covers(model)
        weight = model.lm_head.weight
        self.costs = (CPU if weight.device.type == "cpu" else GPU).costs(
            layers=model.config.n_layer,
            parameters=sum(p.numel() for p in model.parameters()),
            bytes_each=weight.element_size(),
        )
        self.stepper: Stepper | None = None
        self.texts: list[_Text] = []
        self.cache: Cache | None = None
        self.hidden = torch.empty(0)  # (B, block_size, C), the newest of every position

    def __call__(self, window: Window, *, log_probs: Tensor, carried: bool, observed: bool) -> Pass:
        self._move_to(window, carried=carried)
        lengths = window.lengths
        # one text of which nobody keeps the passes: its tensors may be written to, once ours
        alone = self.lean and len(lengths) == 1 and not observed and not self.feedback.of_hidden
        alone = alone and window.tokens.device.type == "cpu"
        ids: list[int] = window.tokens[0].tolist() if alone else []
        number, ours = 0, False

        def run(state: Tensor | None) -> Said:
            nonlocal number, log_probs, ours
            number += 1
            whole = number == self.config.iterations or (number == 1 and observed)
            ends = [
                length if whole else min(length, text.front - 1 + text.width.now)
                for text, length in zip(self.texts, lengths, strict=True)
            ]
            moving = [
                text.front - 1
                for text, length in zip(self.texts, lengths, strict=True)
                if text.front <= length
            ]
            moved: Moved | None = None
            if not moving:
                new_state = torch.zeros_like(log_probs) if state is None else state
            elif alone and max(ends) - moving[0] == 1:
                if not ours:
                    log_probs, ours = log_probs.clone(), True
                    state = torch.zeros_like(log_probs) if state is None else state.clone()
                assert state is not None
                moved = self._evaluate_one(ids, state, log_probs, first=number == 1)
                new_state = state
            else:
                new_state, log_probs = self._evaluate(
                    window, state, log_probs, begin=min(moving), ends=ends
                )
                ours = True
            output = self.hidden[:, : window.tokens.size(1)]
            return Said(
                state=new_state,
                log_probs=log_probs,
                output=output.clone() if observed else output,
                front=Front([t.front for t in self.texts], [t.exact for t in self.texts]),
                moved=moved,
            )

        return run

    def draw_ahead(self, window: Window, recomputed: Recomputed, how: Continuation) -> Drawn | None:
        """A single settled text goes on with a step for each token, and no pass around it."""
        T, text = window.lengths[0], self.texts[0]
        if not self.lean or len(self.texts) > 1 or text.front <= T:
            return None
        assert self.stepper is not None
        room = self.model.config.block_size - T
        how = replace(how, most=min(how.most, room))
        drawn = continue_text(self.stepper, self.feedback, window.tokens, recomputed.said, how)
        if drawn is not None:
            text.front = T + len(drawn.tokens)
        return drawn

    def _move_to(self, window: Window, *, carried: bool) -> None:
        """Take over what the window before has left; a text that slid begins anew."""
        before = {text.row: text for text in self.texts}
        self.texts = [
            before[row]
            if carried and row in before and before[row].start == start
            else _Text(row, start, self._width(length))
            for row, start, length in zip(window.rows, window.starts, window.lengths, strict=True)
        ]
        if self.cache is None:
            batch, config = len(window.rows), self.model.config
            self.cache = self.model.new_cache(batch=batch, capacity=config.block_size)
            self.hidden = self.cache.keys.new_zeros(batch, config.block_size, config.n_embd)
        elif len(before) > len(window.rows):
            places = list(before)
            kept = [places.index(row) for row in window.rows]
            self.cache.keep(kept)
            self.hidden, self.stepper = self.hidden[kept], None
        if self.stepper is None:
            self.stepper = Stepper(self.model, self.cache)

    def _width(self, length: int) -> Width:
        if self.window == "auto":
            return Width(self.costs.width, self.costs, length=length)
        return Width(self.model.config.block_size if self.window == "all" else self.window)

    def _evaluate_one(
        self, ids: list[int], state: Tensor, log_probs: Tensor, *, first: bool
    ) -> Moved:
        """:meth:`_evaluate` of one position of one text; writes to what it is given."""
        text, length = self.texts[0], len(ids)
        at = text.front - 1
        hidden = self._forward(torch.tensor([ids[at : at + 1]]), state, begin=at)
        text.front += 1  # what this position says of the next rests on settled ones alone
        text.width.settled(1)
        target, step = at + 1, 0.0
        known = said = float(state[0, at])  # of a drawn token, nobody has looked at it yet
        if target < length:
            assert self.stepper is not None
            scores = self.stepper.score(hidden[0], torch.tensor(ids[target : target + 1]))
            estimate = self.feedback.estimates(scores, hidden[0])
            said, step = float(estimate), abs(float(scores.log_probs - log_probs[0, target]))
            state[0, target], log_probs[0, target] = estimate[0], scores.log_probs[0]
        return Moved(
            step_max=None if first else [step],
            step_rms=None if first else [step / length**0.5],
            finite=[math.isfinite(said) and math.isfinite(known)],
        )

    def _forward(self, tokens: Tensor, state: Tensor | None, *, begin: int) -> Tensor:
        """Hidden states (B, W, C) of (B, W) tokens at ``begin``, also kept in ``self.hidden``."""
        assert self.cache is not None
        assert self.stepper is not None
        end = begin + tokens.size(1)
        modulation = self.feedback.modulation(None if state is None else state[:, :end])
        hidden = self.hidden[:, begin:end]
        # the plain model is read as everywhere else: with nothing fed back, bit for bit
        plain = begin == 0 and modulation.bias is None and modulation.factor is None
        if self.lean and modulation.hidden is None and not plain:
            self.stepper.run(
                tokens,
                begin=begin,
                out=hidden,
                key_bias=modulation.bias,
                key_factor=modulation.factor,
                layers=self.feedback.layers,
            )
            return hidden
        self.cache.length = begin
        hidden.copy_(
            self.model(
                tokens,
                key_bias=modulation.bias,
                key_factor=modulation.factor,
                layers=self.feedback.layers,
                hidden=None if modulation.hidden is None else modulation.hidden[:, begin:],
                hidden_strength=self.feedback.hidden_strength,
                cache=self.cache,
            )
        )
        return hidden

    def _evaluate(
        self,
        window: Window,
        state: Tensor | None,
        log_probs: Tensor,
        *,
        begin: int,
        ends: list[int],
    ) -> tuple[Tensor, Tensor]:
        """Evaluate positions from ``begin`` to each row's end, and move the fronts on.

        Returns:
            (B, T, ...) the new state and (B, T) the new log-probabilities; both are new tensors.
        """
        tokens, end = window.tokens, max(ends)
        hidden = self._forward(tokens[:, begin:end], state, begin=begin)
        first, behind = begin + 1, min(end + 1, tokens.size(1))  # the estimates that are read off
        old = state
        if old is None:
            old = self.feedback.blank(*log_probs.shape, like=hidden)
        if first >= behind:
            self._advance(window, ends, first, None)
            return old, log_probs
        before = hidden[:, : behind - first]
        scores = self._score(before, tokens[:, first:behind])
        said = self.feedback.estimates(scores, before)  # (B, N, ...)
        exactly, roughly = self._still(
            said, old[:, first:behind], scores.log_probs, log_probs[:, first:behind]
        )
        new_state, new_log_probs = old.clone(), log_probs.clone()
        if len(self.texts) == 1:
            self._advance(window, ends, first, _leading(exactly, roughly))
            # what is settled keeps the value that its cached keys were computed with
            kept = self.texts[0].front - 1 if self.feedback.active else first
            new_state[:, kept:behind] = said[:, kept - first :]
            new_log_probs[:, kept:behind] = scores.log_probs[:, kept - first :]
            return new_state, new_log_probs
        at = torch.arange(first, behind, device=tokens.device)
        fronts = at.new_tensor([text.front for text in self.texts])
        behinds = at.new_tensor([min(e + 1, n) for e, n in zip(ends, window.lengths, strict=True)])
        # no row sees further than it would alone
        open_ = (at >= fronts[:, None]) & (at < behinds[:, None])  # (B, N)
        self._advance(window, ends, first, _leading(exactly | ~open_, roughly | ~open_))
        if self.feedback.active:
            open_ &= at >= at.new_tensor([text.front - 1 for text in self.texts])[:, None]
        wide_open = open_ if said.ndim == 2 else open_[..., None]
        new_state[:, first:behind] = torch.where(wide_open, said, old[:, first:behind])
        new_log_probs[:, first:behind] = torch.where(
            open_, scores.log_probs, log_probs[:, first:behind]
        )
        return new_state, new_log_probs

    def _score(self, hidden: Tensor, targets: Tensor) -> TokenScores:
        if not self.lean or not self.feedback.active:
            return score_targets(self.model, hidden, targets)
        assert self.stepper is not None
        scores = self.stepper.score(hidden.flatten(0, 1), targets.flatten())
        shape = targets.shape
        return TokenScores(scores.log_probs.view(shape), scores.logits.view(shape))

    def _still(
        self, said: Tensor, old: Tensor, log_probs: Tensor, old_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, N): which estimates moved by no more than rounding, which by no more than allowed."""
        limit = said.abs().clamp_min(1.0) * (ROUNDINGS * torch.finfo(said.dtype).eps)
        exactly = (said - old).abs() <= limit
        if exactly.ndim == 3:
            exactly = exactly.all(dim=2)
        if self.config.tolerance == 0:
            return exactly, exactly
        return exactly, exactly | ((log_probs - old_log_probs).abs() <= self.config.tolerance)

    def _advance(
        self, window: Window, ends: list[int], first: int, counts: list[list[int]] | None
    ) -> None:
        """Move each row's front behind the first position that the pass has moved."""
        for i, text in enumerate(self.texts):
            length, end = window.lengths[i], ends[i]
            if text.front > length:
                continue
            front = exact_front = end + 1  # where nothing moved, or nothing is fed back
            if counts is not None and self.feedback.active:
                exact_front, front = (
                    first + count[i] + 1 if first + count[i] < min(end + 1, length) else end + 1
                    for count in counts
                )
            text.exact = text.exact and front == exact_front
            text.width.settled(front - text.front)
            text.front = front


def _leading(exactly: Tensor, roughly: Tensor) -> list[list[int]]:
    """Of (B, N) estimates, how many leading ones are still: both counts, a list of B each."""
    counts: list[list[int]] = (
        torch.stack([exactly, roughly]).long().cumprod(dim=2).sum(dim=2).tolist()
    )
    return counts
