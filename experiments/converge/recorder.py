"""Measures a batch of prompts while it is computed: one record per pass.

Watches what ``generate`` does. Inside a pass everything is tensors over the batch; ``records``
makes tables and summaries of what was seen.

Shapes: B prompts that a generation step continues, R of them in a pass, T tokens, N evaluated
positions, C width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.converge.prompts import EncodedPrompt
from experiments.converge.records import MEASURES, Measures, Pass, Records, Step
from experiments.converge.settings import ConvergeSettings
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import Watcher, Window
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.oracle import LeftToRight, disturbed_reading
from stateful_gpt.recompute import Iteration, Span
from stateful_gpt.scoring import Predictions, TokenScores, score_targets, score_tokens


class Recorder:
    """Watches the generation of one batch of prompts.

    Args:
        double: the model in float64, for the Lyapunov exponents; None for none.
        on_pass: called after every pass with the generation step, the number of the pass, the
            measures of all prompts of the step (B numbers each, those of the last pass of each),
            and how many of the prompts are at rest.
    """

    def __init__(
        self,
        prompts: list[EncodedPrompt],
        *,
        model: LanguageModel,
        feedback: Feedback,
        settings: ConvergeSettings,
        double: LanguageModel | None,
        on_pass: Callable[[int, int, Measures, int], object],
    ) -> None:
        self.records = Records(prompts, [], settings.reporting_tolerance)
        self._model, self._double, self._feedback = model, double, feedback
        self._tolerance = settings.reporting_tolerance
        self._wanted = settings.measures
        self._on_pass = on_pass
        longest = max(len(prompt.tokens) for prompt in prompts)
        self._fixed_text = settings.generation.max_new_tokens == 0
        self._capacity = min(model.block_size, longest + settings.generation.max_new_tokens)
        self._reader: LeftToRight | None = None
        self._predictions: Predictions | None = None
        self._rows: list[int] = []  # of the window, those that the tensors below hold
        self._hidden = torch.empty(0)  # (R, T, C) after the pass before
        self._moved: Tensor | None = None  # (R, T) how far it moved hidden states
        self._first = True  # the next pass is the first over its window
        self._latest: dict[str, list[float]] = {}  # of each row, in its last pass

    def watch(self, window: Window) -> Watcher:
        """Called before each recompute: solves it exactly, then watches its passes.

        Estimates that depend on themselves have no fixed point to know beforehand: where the last
        pass left them takes its place.
        """
        step = Step(window)
        last = self.records.steps[-1].window if self.records.steps else None
        if self._wanted.oracle and self._feedback.triangular:
            if self._fixed_text and self._double is not None and self._feedback.active:
                # one reading tells both
                step.final, step.exponents = disturbed_reading(
                    self._double, window.tokens, self._feedback, lengths=window.lengths
                )
            else:
                step.final = self._fixed_point(window, last)
        batch, length = window.tokens.shape
        self._rows, self._first, self._moved = list(range(batch)), True, None
        self._hidden = torch.zeros(
            batch, length, self._model.width, dtype=self._model.dtype, device=self._model.device
        )
        self._latest = {name: [float("nan")] * batch for name in MEASURES}
        before, self._predictions = self._predictions, None
        if self._wanted.kl:
            self._predictions = Predictions(self._model, batch=batch, length=length)
            if before is not None and last is not None and not window.plain_first:
                # of what is final and not read again, the divergence is what it was
                kept, known = [last.rows.index(row) for row in window.rows], last.tokens.size(1)
                self._predictions.kl_effect[:, :known] = before.kl_effect[kept][:, :length]
        if not window.plain_first:
            hidden = self._model.read(window.tokens)
            log_probs = score_tokens(self._model, hidden, window.tokens).log_probs
            step.plain_nll = self._nll(log_probs, window.lengths).tolist()
            if self._predictions is not None:
                self._predictions.set_plain(hidden, begin=0)
        self.records.steps.append(step)
        return Watcher(self._observe, self._score)

    def _score(self, hidden: Tensor, tokens: Tensor, span: Span) -> TokenScores:
        """Score (R, N, C) hidden states, and keep what this pass has changed about them."""
        self._keep(span.rows, tokens.size(1))
        begin, end = span.begin, span.end
        if not self._first:
            step = (hidden - self._hidden[:, begin:end]).double().norm(dim=2)  # (R, N)
            self._moved = step.new_zeros(tokens.shape)
            self._moved[:, begin:end] = step
        self._hidden[:, begin:end] = hidden
        if self._predictions is None:
            targets = tokens[:, begin + 1 : end + 1]
            return score_targets(self._model, hidden[:, : targets.size(1)], targets)
        plain = self._first and self.records.steps[-1].window.plain_first
        return self._predictions.score(hidden, tokens, begin=begin, first=plain)

    def _keep(self, rows: list[int], length: int) -> None:
        if rows != self._rows:
            kept = [self._rows.index(row) for row in rows]
            self._rows, self._hidden = rows, self._hidden[kept]
            if self._predictions is not None:
                self._predictions.keep(kept)
        self._hidden = self._hidden[:, :length]

    def _observe(self, iteration: Iteration) -> None:
        step, rows = self.records.steps[-1], iteration.span.rows
        log_probs = iteration.log_probs  # (R, T)
        lengths = [step.window.lengths[row] for row in rows]
        count = torch.tensor(lengths, device=log_probs.device)
        missing = torch.full_like(count, torch.nan, dtype=torch.float64)
        columns = dict.fromkeys(MEASURES, missing)
        evaluated = iteration.span.end > iteration.span.begin
        columns["nll"] = self._nll(log_probs, lengths)
        if iteration.step_max is not None and iteration.step_rms is not None:
            columns["step_max"], columns["step_rms"] = iteration.step_max, iteration.step_rms
            moved = self._moved if evaluated else None
            columns["hidden_step_norm"] = (
                missing.nan_to_num(0.0) if moved is None else self._mean(moved, count)
            )
        if step.final is not None:
            error = (log_probs - step.final[rows, : log_probs.size(1)]).abs()
            error = error.masked_fill(self._padding(error, count), 0.0)
            columns["oracle_error_max"] = error.amax(dim=1)
            away = ~(error <= self._tolerance)  # NaN is away
            columns["settled_prefix"] = torch.where(
                away.any(dim=1), away.long().argmax(dim=1), count
            )
        if self._predictions is not None:
            columns["kl_effect"] = self._mean(self._predictions.kl_effect, count)
            if iteration.number > 1:
                kl_step = self._mean(self._predictions.kl_step, count)
                columns["kl_step"] = kl_step if evaluated else torch.zeros_like(kl_step)
        table = torch.stack([column.double() for column in columns.values()]).tolist()
        measures = dict(zip(MEASURES, table, strict=True))
        step.passes.append(Pass(rows, log_probs.cpu(), measures))
        self._first = False
        for name, values in measures.items():
            for row, value in zip(rows, values, strict=True):
                self._latest[name][row] = value
        at_rest = len(step.window.rows) - len(rows)
        self._on_pass(step.window.step, iteration.number, self._latest, at_rest)

    def _padding(self, values: Tensor, count: Tensor) -> Tensor:
        """(R, T): True behind the end of each row."""
        return torch.arange(values.size(1), device=values.device) >= count[:, None]

    def _mean(self, values: Tensor, count: Tensor) -> Tensor:
        """(R,) means of (R, T) values over each row's own positions."""
        values = values[:, : int(count.max())]
        total = values.double().masked_fill(self._padding(values, count), 0.0).sum(dim=1)
        return total / count

    def _nll(self, log_probs: Tensor, lengths: list[int]) -> Tensor:
        """(R,) nats per predicted token; NaN of a text of one token."""
        predicted = torch.tensor(lengths, device=log_probs.device) - 1
        values = log_probs.double().masked_fill(self._padding(log_probs, predicted + 1), 0.0)
        return -values[:, 1:].sum(dim=1) / predicted

    def _fixed_point(self, window: Window, last: Window | None) -> Tensor:
        """(B, T). While no window has slid, only new tokens have to be read."""
        if not self._feedback.active:  # every pass is right, whatever it is fed
            return score_tokens(
                self._model, self._model.read(window.tokens), window.tokens
            ).log_probs
        begin = 0
        slid = last is not None and any(
            start != last.starts[last.rows.index(row)]
            for row, start in zip(window.rows, window.starts, strict=True)
        )
        if self._reader is None or last is None or slid:
            batch = len(window.rows)
            self._reader = LeftToRight(
                self._model, self._feedback, batch=batch, capacity=self._capacity
            )
        else:
            kept = [last.rows.index(row) for row in window.rows]
            self._reader.keep(kept)
            begin = min(last.lengths[i] for i in kept) - 1  # its estimate is known
            self._reader.set_back(begin)
        return self._reader.read(window.tokens[:, begin:]).clone()
