"""What was recorded of prompts, as rows of the run's tables and as summaries.

Shapes: T tokens of the window of a generation step.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from experiments.converge.prompts import EncodedPrompt
from stateful_gpt.convergence import (
    contraction_rate,
    iterations_to_tolerance,
    rounding_floor,
    settled_prefixes,
)
from stateful_gpt.generate import Generation
from stateful_gpt.recompute import Outcome
from stateful_gpt.tokenizer import Tokenizer, decode, token_text

Measures = dict[str, list[float]]  # a number for each row, NaN where there is none


def _column(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning})


_REAL, _WHOLE = pa.float64(), pa.int32()
_WHERE = [
    _column("prompt_id", pa.string(), "the id of the prompt"),
    _column("step", _WHOLE, "tokens generated so far"),
    _column("iteration", _WHOLE, "the pass, from 1, the plain model where nothing is carried"),
]
_MEASURED = [
    _column("step_max", _REAL, "how far the estimates moved since the last pass at most, nats"),
    _column("step_rms", _REAL, "how far they moved since the last pass, root mean square, nats"),
    _column("settled_prefix", _WHOLE, "leading tokens within reporting_tolerance of their end"),
    _column("oracle_error_max", _REAL, "largest distance to the exact solution, nats"),
    _column("nll", _REAL, "mean negative log-probability, nats per token"),
    _column("kl_step", _REAL, "KL divergence of the predictions from the last pass's, nats"),
    _column("kl_effect", _REAL, "KL divergence of the predictions from the plain model's, nats"),
    _column("hidden_step_norm", _REAL, "norm of the step of hidden states, mean over positions"),
]
MEASURES = [column.name for column in _MEASURED]
ITERATIONS = pa.schema([*_WHERE, *_MEASURED])


def trajectory_schema(dtype: torch.dtype) -> pa.Schema:
    """The columns of ``trajectory.parquet``; log-probabilities in the precision of the run."""
    kind = _REAL if dtype == torch.float64 else pa.float32()
    return pa.schema(
        [
            *_WHERE,
            _column("position", _WHOLE, "of the token in its text, from 0"),
            _column("token_id", _WHOLE, "of the token in the vocabulary"),
            _column("token", pa.string(), "the text of the token"),
            _column("log_prob", kind, "of the token, nats; missing where nothing predicts it"),
        ]
    )


@dataclass
class Step:
    """What was seen of one prompt in one generation step."""

    number: int  # tokens generated so far
    start: int  # position in the text of the first token of the window
    tokens: Tensor  # (T,) ids of the window
    solved: bool  # whether the fixed point is known beforehand
    plain_nll: float | None  # of the plain model; None where that is the first pass
    log_probs: list[Tensor] = field(default_factory=list)  # (T,) nats, after each pass
    measures: list[dict[str, float]] = field(default_factory=list)  # of each pass, or NaN

    def prefixes(self, tolerance: float) -> list[int] | None:
        """Settled prefixes, judged by where the last pass ended; None where too little is known."""
        if len(self.log_probs) < 2:
            return None
        return settled_prefixes(self.log_probs, tolerance=tolerance)

    def errors(self, tolerance: float, outcome: Outcome) -> list[float]:
        """The distance from the fixed point after each pass (nats); empty where it is unknown."""
        if self.solved:
            return [measures["oracle_error_max"] for measures in self.measures]
        if outcome is Outcome.SETTLED and len(self.log_probs) == 1:
            return [0.0]  # at rest where it began: nothing is fed back
        prefixes = self.prefixes(tolerance)
        if prefixes is None or prefixes[-1] < len(self.tokens):
            return []
        return [(values - self.log_probs[-1]).abs().max().item() for values in self.log_probs]


@dataclass
class Records:
    """The steps of each prompt of a batch."""

    prompts: list[EncodedPrompt]
    texts: list[list[Step]]
    encoding: Tokenizer
    tolerance: float  # nats from where an estimate ends that count as settled

    def trajectory(self) -> pa.Table:
        """Rows of ``trajectory.parquet``.

        Positions count from the beginning of the text; the first of a window, which nothing
        predicts, has no log-probability.
        """
        passes = [
            (prompt.id, step, number, values)
            for prompt, steps in zip(self.prompts, self.texts, strict=True)
            for step in steps
            for number, values in enumerate(step.log_probs, start=1)
        ]
        lengths = [len(values) for *_, values in passes]
        row = np.repeat(np.arange(len(passes)), lengths)
        places = np.concatenate([np.arange(length) for length in lengths])
        ids = torch.cat([step.tokens for _, step, _, _ in passes]).numpy()
        kinds, which = np.unique(ids, return_inverse=True)
        names = pa.array([token_text(self.encoding, int(i)) for i in kinds], pa.string())
        log_probs = torch.cat([values for *_, values in passes]).numpy()
        return pa.table(
            {
                "prompt_id": pa.array([name for name, *_ in passes], pa.string()).take(row),
                "step": np.array([step.number for _, step, _, _ in passes])[row],
                "iteration": np.array([number for _, _, number, _ in passes])[row],
                "position": np.array([step.start for _, step, _, _ in passes])[row] + places,
                "token_id": ids,
                "token": names.take(which),
                "log_prob": pa.array(log_probs, mask=places == 0),
            },
            schema=trajectory_schema(passes[0][-1].dtype),
        )

    def iterations(self) -> pa.Table:
        """Rows of ``iterations.parquet``."""
        rows = []
        for prompt, steps in zip(self.prompts, self.texts, strict=True):
            for step in steps:
                prefixes = None if step.solved else step.prefixes(self.tolerance)
                for number, measures in enumerate(step.measures, start=1):
                    row: dict[str, Any] = {name: _number(x) for name, x in measures.items()}
                    if prefixes is not None:
                        row["settled_prefix"] = prefixes[number - 1]
                    where = {"prompt_id": prompt.id, "step": step.number, "iteration": number}
                    rows.append(row | where)
        return pa.Table.from_pylist(rows, schema=ITERATIONS)

    def summaries(self, result: Generation, exponents: list[float | None]) -> list[dict[str, Any]]:
        """What became of each prompt; ``exponents`` are Lyapunov's.

        Over several generation steps, the outcome is the worst and iterations_to_tolerance the
        largest of them; everything else is of the last one, which holds the whole text.
        """
        return [
            self._summary(prompt, self.texts[i], result.outcomes[i], result.tokens[i])
            | {"lyapunov": exponents[i]}
            for i, prompt in enumerate(self.prompts)
        ]

    def _summary(
        self, prompt: EncodedPrompt, steps: list[Step], outcomes: list[Outcome], tokens: list[int]
    ) -> dict[str, Any]:
        last, pairs = steps[-1], list(zip(steps, outcomes, strict=True))
        errors = [step.errors(self.tolerance, outcome) for step, outcome in pairs]
        reached = [iterations_to_tolerance(each, tolerance=self.tolerance) for each in errors]
        diverged = [
            {"step": step.number, "iteration": len(step.log_probs)}
            for step, outcome in pairs
            if outcome is Outcome.DIVERGED
        ]
        generated = tokens[len(prompt.tokens) :]
        plain = last.measures[0]["nll"] if last.plain_nll is None else last.plain_nll
        return {
            "prompt_id": prompt.id,
            "text": prompt.text,
            "prompt_tokens": len(prompt.tokens),
            "generated_tokens": len(generated),
            "generated_text": decode(self.encoding, generated),
            "outcome": max(outcomes, key=list(Outcome).index).value,
            "diverged_at": diverged[0] if diverged else None,
            "iterations": sum(len(step.log_probs) for step in steps),
            "iterations_to_tolerance": largest(reached),
            "reporting_tolerance": self.tolerance,
            "rate": contraction_rate(errors[-1], floor=rounding_floor(last.log_probs[0])),
            "nll": _number(last.measures[-1]["nll"]),
            "nll_plain": _number(plain),
            "kl_effect": _number(last.measures[-1]["kl_effect"]),
            "oracle_error_max": _number(last.measures[-1]["oracle_error_max"]),
        }


def overall(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """The run as a whole.

    The outcome is the worst, iterations_to_tolerance the largest (missing if any prompt's is);
    everything else is the mean over the prompts that have it, but that nll_plain is over those of
    nll, if there are any: one that diverged would make the two means of other texts.
    """
    order = [outcome.value for outcome in Outcome]
    summary: dict[str, Any] = {
        "outcome": max((prompt["outcome"] for prompt in prompts), key=order.index),
        "prompts": len(prompts),
        "iterations": sum(prompt["iterations"] for prompt in prompts),
        "iterations_to_tolerance": largest([p["iterations_to_tolerance"] for p in prompts]),
        "seconds": round(sum(prompt["seconds"] for prompt in prompts), 3),
    }
    ended = [prompt for prompt in prompts if prompt["nll"] is not None] or prompts
    for key in ("rate", "lyapunov", "nll", "nll_plain", "kl_effect", "oracle_error_max"):
        of = ended if key == "nll_plain" else prompts
        values = [prompt[key] for prompt in of if prompt[key] is not None]
        summary[key] = sum(values) / len(values) if values else None
    return summary


def largest(values: list[int | None]) -> int | None:
    """The largest of some counts; None if one of them is missing."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
