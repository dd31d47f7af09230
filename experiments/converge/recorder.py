"""Measures a generation while it runs: one record per pass, and the sums of them.

Turns what ``generate`` shows its observer into the rows of ``trajectory.parquet`` and
``iterations.parquet`` and into one prompt's part of ``summary.json``.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa
import tiktoken
import torch
from torch import Tensor

from experiments.converge.prompts import EncodedPrompt
from experiments.converge.settings import ConvergeSettings
from stateful_gpt.convergence import (
    contraction_rate,
    error_max,
    iterations_to_tolerance,
    mean_nll,
    rounding_floor,
    settled_prefix,
    settled_prefixes,
)
from stateful_gpt.feedback import Feedback, mean_kls, score_tokens
from stateful_gpt.model import GPT
from stateful_gpt.oracle import LeftToRight, lyapunov_exponent
from stateful_gpt.recompute import Iteration, Outcome
from stateful_gpt.solving import Window
from stateful_gpt.tokenizer import decode, token_text

ITERATIONS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("step", pa.int32()),
        ("iteration", pa.int32()),
        ("step_max", pa.float64()),
        ("step_rms", pa.float64()),
        ("settled_prefix", pa.int32()),
        ("oracle_error_max", pa.float64()),
        ("nll", pa.float64()),
        ("kl_step", pa.float64()),
        ("kl_effect", pa.float64()),
        ("hidden_step_norm", pa.float64()),
    ]
)


def trajectory_schema(dtype: torch.dtype) -> pa.Schema:
    """The columns of ``trajectory.parquet``; log-probabilities in the precision of the run."""
    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("step", pa.int32()),
            ("iteration", pa.int32()),
            ("position", pa.int32()),
            ("token_id", pa.int32()),
            ("token", pa.string()),
            ("log_prob", pa.float64() if dtype == torch.float64 else pa.float32()),
        ]
    )


@dataclass
class _Step:
    """One generation step: its window, where it ends exactly, and its passes."""

    window: Window
    final: Tensor | None  # (T,) the fixed point, where it can be known beforehand
    plain: Tensor | None  # (T, C) hidden states of the plain pass; None until it has run
    log_probs: list[Tensor] = field(default_factory=list)  # (T,) a pass
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)  # distance from the fixed point
    previous: Tensor | None = None  # (T, C) hidden states of the pass before


class Recorder:
    """Observes the generation of one prompt."""

    def __init__(
        self,
        prompt: EncodedPrompt,
        *,
        model: GPT,
        feedback: Feedback,
        settings: ConvergeSettings,
        on_pass: Callable[[], object],
    ) -> None:
        self.prompt = prompt
        self.model = model
        self.feedback = feedback
        self.tolerance = settings.reporting_tolerance
        self.cold = settings.recompute.start == "cold"
        self.on_pass = on_pass
        self.steps: list[_Step] = []
        self.started = time.monotonic()
        self._reader: LeftToRight | None = None
        self._read = 0

    def window(self, window: Window) -> Callable[[Iteration], None]:
        """Called before each recompute: solves it exactly, then watches its passes.

        Estimates that depend on themselves have no fixed point to know beforehand: where the last
        pass left them takes its place.
        """
        final = self._fixed_point(window)[0].cpu() if self.feedback.triangular else None
        step = _Step(window, final=final, plain=None)
        if not self.cold and window.step > 0:
            step.plain = self.model(window.tokens)[0]
        self.steps.append(step)
        return self.observe

    def observe(self, iteration: Iteration) -> None:
        step = self.steps[-1]
        hidden = iteration.said.output[0]  # (T, C)
        log_probs = iteration.said.log_probs[0].cpu()
        if step.plain is None:
            step.plain = hidden  # the first pass from a cold start is the plain model's
        others = [step.plain] if step.previous is None else [step.plain, step.previous]
        kls = [_finite(value) for value in mean_kls(self.model, others, hidden)]
        error, prefix, moved = None, None, None
        if step.final is not None:
            error = error_max(log_probs, step.final)
            prefix = settled_prefix(log_probs, step.final, tolerance=self.tolerance)
            step.errors.append(error)
        if step.previous is not None:
            moved = (hidden - step.previous).double().norm(dim=1).mean().item()
        step.log_probs.append(log_probs)
        step.rows.append(
            {
                "prompt_id": self.prompt.id,
                "step": step.window.step,
                "iteration": iteration.number,
                "step_max": _finite(iteration.step_max[0]) if iteration.step_max else None,
                "step_rms": _finite(iteration.step_rms[0]) if iteration.step_rms else None,
                "settled_prefix": prefix,
                "oracle_error_max": _finite(error),
                "nll": _finite(mean_nll(log_probs)),
                "kl_step": kls[1] if step.previous is not None else None,
                "kl_effect": kls[0],
                "hidden_step_norm": _finite(moved),
            }
        )
        step.previous = hidden
        self.on_pass()

    def finish(self) -> None:
        """Called once all passes are seen: measures what only the end can tell."""
        for step in self.steps:
            if step.final is not None or len(step.log_probs) < 2:
                continue
            last = step.log_probs[-1]
            prefixes = settled_prefixes(step.log_probs, tolerance=self.tolerance)
            for row, prefix in zip(step.rows, prefixes, strict=True):
                row["settled_prefix"] = prefix
            if prefixes[-1] == len(last):
                step.errors = [error_max(log_probs, last) for log_probs in step.log_probs]

    def iterations_table(self) -> pa.Table:
        return pa.Table.from_pylist(
            [row for step in self.steps for row in step.rows], schema=ITERATIONS
        )

    def trajectory_table(self, tokens: list[int], encoding: tiktoken.Encoding) -> pa.Table:
        """Every estimate of every pass; positions count from the beginning of the text."""
        names = [token_text(encoding, token) for token in tokens]
        columns: dict[str, list[Any]] = {"step": [], "iteration": [], "position": []}
        values: list[Tensor] = []
        for step in self.steps:
            begin, length = step.window.starts[0], step.window.lengths[0]
            for number, log_probs in enumerate(step.log_probs, start=1):
                columns["step"].extend([step.window.step] * length)
                columns["iteration"].extend([number] * length)
                columns["position"].extend(range(begin, begin + length))
                values.append(log_probs)
        joined = torch.cat(values)
        return pa.table(
            {
                "prompt_id": [self.prompt.id] * len(joined),
                **columns,
                "token_id": [tokens[i] for i in columns["position"]],
                "token": [names[i] for i in columns["position"]],
                "log_prob": joined.numpy(),
            },
            schema=trajectory_schema(joined.dtype),
        )

    def summary(
        self,
        tokens: list[int],
        outcomes: list[Outcome],
        *,
        encoding: tiktoken.Encoding,
        double: GPT,
    ) -> dict[str, Any]:
        """What became of the prompt.

        Over several generation steps, the outcome is the worst and iterations_to_tolerance the
        largest of them; everything else is of the last one, which holds the whole text.
        """
        last = self.steps[-1]
        reached = [
            iterations_to_tolerance(step.errors, tolerance=self.tolerance) for step in self.steps
        ]
        floor = rounding_floor(last.log_probs[0])
        generated = tokens[len(self.prompt.tokens) :]
        plain_nll = self._plain_nll(last)
        worst = max(outcomes, key=list(Outcome).index)
        return {
            "prompt_id": self.prompt.id,
            "text": self.prompt.text,
            "prompt_tokens": len(self.prompt.tokens),
            "generated_tokens": len(generated),
            "generated_text": decode(encoding, generated),
            "outcome": worst.value,
            "diverged_at": next(
                (
                    {"step": step.window.step, "iteration": len(step.rows)}
                    for step, outcome in zip(self.steps, outcomes, strict=True)
                    if outcome is Outcome.DIVERGED
                ),
                None,
            ),
            "iterations": sum(len(step.rows) for step in self.steps),
            "iterations_to_tolerance": largest(reached),
            "reporting_tolerance": self.tolerance,
            "rate": contraction_rate(last.errors, floor=floor),
            "lyapunov": lyapunov_exponent(double, last.window.tokens[0], self.feedback),
            "nll": last.rows[-1]["nll"],
            "nll_plain": plain_nll,
            "kl_effect": last.rows[-1]["kl_effect"],
            "oracle_error_max": last.rows[-1]["oracle_error_max"],
            "seconds": round(time.monotonic() - self.started, 3),
        }

    def _plain_nll(self, step: _Step) -> float | None:
        assert step.plain is not None
        scores = score_tokens(self.model, step.plain[None], step.window.tokens)
        return _finite(mean_nll(scores.log_probs[0]))

    def _fixed_point(self, window: Window) -> Tensor:
        """(1, T). While the window has not slid, only its new tokens have to be read."""
        if self._reader is None or window.starts[0] > 0:
            self._reader = LeftToRight(self.model, self.feedback)
            self._read = 0
        log_probs = self._reader.read(window.tokens[:, self._read :])
        self._read = window.lengths[0]
        return log_probs.clone()


def overall(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """The run as a whole.

    The outcome is the worst, iterations_to_tolerance the largest (missing if any prompt's is);
    everything else is the mean over the prompts that have it.
    """
    order = [outcome.value for outcome in Outcome]
    reached = [prompt["iterations_to_tolerance"] for prompt in prompts]
    summary: dict[str, Any] = {
        "outcome": max((prompt["outcome"] for prompt in prompts), key=order.index),
        "prompts": len(prompts),
        "iterations": sum(prompt["iterations"] for prompt in prompts),
        "iterations_to_tolerance": largest(reached),
        "seconds": round(sum(prompt["seconds"] for prompt in prompts), 3),
    }
    for key in ("rate", "lyapunov", "nll", "nll_plain", "kl_effect", "oracle_error_max"):
        values = [prompt[key] for prompt in prompts if prompt[key] is not None]
        summary[key] = sum(values) / len(values) if values else None
    return summary


@lru_cache(maxsize=1)
def in_float64(model: GPT) -> GPT:
    """The model itself if it is in float64, else a copy that is, kept for the next run."""
    if model.lm_head.weight.dtype == torch.float64:
        return model
    return copy.deepcopy(model).double()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def largest(values: list[int | None]) -> int | None:
    """The largest of some counts; None if one of them is missing."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None
