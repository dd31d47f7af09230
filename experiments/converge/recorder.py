"""Measures a batch of prompts while it is computed: one record per pass.

Watches what ``generate`` does. Inside a pass everything is tensors over the batch; ``records``
makes tables and summaries of what was seen of each prompt.

Shapes: B prompts that a generation step continues, R of them in a pass, T tokens, N evaluated
positions, C width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.converge.prompts import EncodedPrompt
from experiments.converge.records import MEASURES, Measures, Records, Step
from experiments.converge.settings import ConvergeSettings
from stateful_gpt.checkpoint import Checkpoint
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
        checkpoint: Checkpoint[LanguageModel],
        feedback: Feedback,
        settings: ConvergeSettings,
        double: LanguageModel | None,
        on_pass: Callable[[int, int, Measures, int], object],
    ) -> None:
        tolerance = settings.reporting_tolerance
        self.records = Records(prompts, [[] for _ in prompts], checkpoint.tokenizer, tolerance)
        self._model, self._double, self._feedback = checkpoint.model, double, feedback
        self._wanted = settings.measures
        self._on_pass = on_pass
        new_tokens = settings.generation.max_new_tokens
        self._fixed_text = new_tokens == 0
        longest = max(len(prompt.tokens) for prompt in prompts)
        self._capacity = min(checkpoint.model.block_size, longest + new_tokens)
        self._reader: LeftToRight | None = None
        self._predictions: Predictions | None = None
        self._window: Window | None = None
        self._final: Tensor | None = None  # (B, T) the fixed point, where it can be known
        self._exponents: list[float | None] | None = None  # Lyapunov's, where they came with it
        self._steps: list[Step] = []  # of each row of the window
        self._rows: list[int] = []  # of the window, those that the tensors below hold
        self._hidden = torch.empty(0)  # (R, T, C) after the pass before
        self._moved = torch.empty(0)  # (R, T) how far the last pass moved hidden states

    def watch(self, window: Window) -> Watcher:
        """Called before each recompute: solves it exactly, then watches its passes.

        Estimates that depend on themselves have no fixed point to know beforehand: where the last
        pass left them takes its place.
        """
        last, self._window, self._final = self._window, window, None
        if self._wanted.oracle and self._feedback.triangular:
            if self._fixed_text and self._double is not None and self._feedback.active:
                # one reading tells both
                self._final, self._exponents = disturbed_reading(
                    self._double, window.tokens, self._feedback, lengths=window.lengths
                )
            else:
                self._final = self._fixed_point(window, last)
        batch, length = window.tokens.shape
        self._rows = list(range(batch))
        self._hidden = torch.zeros(
            batch, length, self._model.width, dtype=self._model.dtype, device=self._model.device
        )
        before, self._predictions = self._predictions, None
        if self._wanted.kl:
            self._predictions = Predictions(self._model, batch=batch, length=length)
            if before is not None and last is not None and not window.plain_first:
                # of what is final and not read again, the divergence is what it was
                kept, known = [last.rows.index(row) for row in window.rows], last.tokens.size(1)
                self._predictions.kl_effect[:, :known] = before.kl_effect[kept][:, :length]
        plain_nll: list[float] | list[None] = [None] * batch
        if not window.plain_first:
            hidden = self._model.read(window.tokens)
            log_probs = score_tokens(self._model, hidden, window.tokens).log_probs
            count = torch.tensor(window.lengths, device=log_probs.device)
            plain_nll = self._nll(log_probs, count).tolist()
            if self._predictions is not None:
                self._predictions.set_plain(hidden, begin=0)
        solved, tokens = self._final is not None, window.tokens.cpu()
        self._steps = []
        for i, row in enumerate(window.rows):
            ids = tokens[i, : window.lengths[i]]
            self._steps.append(Step(window.step, window.starts[i], ids, solved, plain_nll[i]))
            self.records.texts[row].append(self._steps[-1])
        return Watcher(self._observe, self._score)

    def exponents(self) -> list[float | None]:
        """Lyapunov's of each prompt's last window; None where it is not asked for or known."""
        if self._exponents is not None:
            return self._exponents
        texts = [steps[-1].tokens for steps in self.records.texts]
        if self._double is None or not (self._feedback.active and self._feedback.triangular):
            return [None] * len(texts)
        tokens = pad_sequence(texts, batch_first=True).to(self._double.device)
        lengths = [len(text) for text in texts]
        return disturbed_reading(self._double, tokens, self._feedback, lengths=lengths)[1]

    def _score(self, hidden: Tensor, tokens: Tensor, span: Span) -> TokenScores:
        """Score (R, N, C) hidden states, and keep what this pass has changed about them."""
        self._keep(span.rows, tokens.size(1))
        begin, end = span.begin, span.end
        others = self._padding(hidden, torch.tensor(span.ends, device=hidden.device) - begin)
        hidden = torch.where(others[:, :, None], self._hidden[:, begin:end], hidden)  # not its own
        step = (hidden - self._hidden[:, begin:end]).double().norm(dim=2)  # (R, N)
        self._moved = torch.nn.functional.pad(step, (begin, tokens.size(1) - end))
        self._hidden[:, begin:end] = hidden
        if self._predictions is None:
            targets = tokens[:, begin + 1 : end + 1]
            return score_targets(self._model, hidden[:, : targets.size(1)], targets)
        plain = not self._steps[0].log_probs and self._steps[0].plain_nll is None
        return self._predictions.score(hidden, tokens, begin=begin, first=plain)

    def _keep(self, rows: list[int], length: int) -> None:
        if rows != self._rows:
            kept = [self._rows.index(row) for row in rows]
            self._rows, self._hidden = rows, self._hidden[kept]
            if self._predictions is not None:
                self._predictions.keep(kept)
        self._hidden = self._hidden[:, :length]

    def _observe(self, iteration: Iteration) -> None:
        rows, log_probs = iteration.span.rows, iteration.log_probs  # (R, T)
        self._keep(rows, log_probs.size(1))  # nothing was scored where nothing is evaluated
        seen = [self._steps[row] for row in rows]
        count = torch.tensor([len(step.tokens) for step in seen], device=log_probs.device)
        missing = torch.full_like(count, torch.nan, dtype=torch.float64)
        still = torch.zeros_like(missing)
        columns = dict.fromkeys(MEASURES, missing)
        evaluated = iteration.span.end > iteration.span.begin
        columns["nll"] = self._nll(log_probs, count)
        if iteration.step_max is not None and iteration.step_rms is not None:
            columns["step_max"], columns["step_rms"] = iteration.step_max, iteration.step_rms
            columns["hidden_step_norm"] = self._mean(self._moved, count) if evaluated else still
        if self._final is not None:
            error = (log_probs - self._final[rows, : log_probs.size(1)]).abs()
            error = error.masked_fill(self._padding(error, count), 0.0)
            columns["oracle_error_max"] = error.amax(dim=1)
            away = ~(error <= self.records.tolerance)  # NaN is away
            first = away.long().argmax(dim=1)
            columns["settled_prefix"] = torch.where(away.any(dim=1), first, count)
        if (predictions := self._predictions) is not None:
            columns["kl_effect"] = self._mean(predictions.kl_effect, count)
            if iteration.number > 1:
                columns["kl_step"] = self._mean(predictions.kl_step, count) if evaluated else still
        table = torch.stack([column.double() for column in columns.values()], dim=1).tolist()
        each = zip(seen, log_probs.cpu(), table, iteration.ran, strict=True)
        for step, values, measured, own in each:
            if own:  # a text that has ended is only read along
                step.log_probs.append(values[: len(step.tokens)])
                step.measures.append(dict(zip(MEASURES, measured, strict=True)))
        latest = {name: [step.measures[-1][name] for step in self._steps] for name in MEASURES}
        self._on_pass(self._steps[0].number, iteration.number, latest, iteration.at_rest)

    def _padding(self, values: Tensor, count: Tensor) -> Tensor:
        """(R, T): True behind the end of each row."""
        return torch.arange(values.size(1), device=values.device) >= count[:, None]

    def _mean(self, values: Tensor, count: Tensor) -> Tensor:
        """(R,) means of (R, T) values over each row's own positions."""
        values = values[:, : int(count.max())]
        return values.double().masked_fill(self._padding(values, count), 0.0).sum(dim=1) / count

    def _nll(self, log_probs: Tensor, count: Tensor) -> Tensor:
        """(R,) nats per predicted token; NaN of a text of one token."""
        return -self._mean(log_probs[:, 1:], count - 1)

    def _fixed_point(self, window: Window, last: Window | None) -> Tensor:
        """(B, T). While no window has slid, only new tokens have to be read."""
        model, feedback, begin = self._model, self._feedback, 0
        if not feedback.active:  # every pass is right, whatever it is fed
            return score_tokens(model, model.read(window.tokens), window.tokens).log_probs
        slid = last is not None and any(
            start != last.starts[last.rows.index(row)]
            for row, start in zip(window.rows, window.starts, strict=True)
        )
        if self._reader is None or last is None or slid:
            batch, capacity = len(window.rows), self._capacity
            self._reader = LeftToRight(model, feedback, batch=batch, capacity=capacity)
        else:
            kept = [last.rows.index(row) for row in window.rows]
            self._reader.keep(kept)
            begin = min(last.lengths[i] for i in kept) - 1  # its estimate is known
            self._reader.set_back(begin)
        return self._reader.read(window.tokens[:, begin:]).clone()
