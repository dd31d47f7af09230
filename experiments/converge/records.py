"""What was recorded of a batch of prompts, as rows of the run's tables and as summaries.

Shapes: B prompts that a generation step continues, R of them in a pass, T tokens.
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
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import Generation, Window
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.oracle import lyapunov_exponents
from stateful_gpt.recompute import Outcome
from stateful_gpt.tokenizer import Tokenizer, decode, token_text

Measures = dict[str, list[float]]  # a number for each row, NaN where there is none
MEASURES = {
    "step_max": "how far the estimates moved since the last pass at most, nats",
    "step_rms": "how far the estimates moved since the last pass, root mean square, nats",
    "settled_prefix": "tokens from the start within reporting_tolerance of where they end",
    "oracle_error_max": "largest distance to the exact solution, nats",
    "nll": "mean negative log-probability, nats per token",
    "kl_step": "KL divergence of the predictions from the last pass's, nats",
    "kl_effect": "KL divergence of the predictions from the plain model's, nats",
    "hidden_step_norm": "Euclidean norm of the step of the hidden states, mean over positions",
}
MEANINGS = MEASURES | {
    "prompt_id": "the id of the prompt",
    "step": "tokens generated so far",
    "iteration": "the pass, from 1, which is the plain model",
    "position": "of the token in its text, from 0",
    "token_id": "of the token in the vocabulary",
    "token": "the text of the token",
    "log_prob": "log-probability of the token, nats; missing where nothing predicts it",
}


def _schema(**columns: pa.DataType) -> pa.Schema:
    """Columns that carry what they mean."""
    return pa.schema(
        [
            pa.field(name, kind, metadata={"meaning": MEANINGS[name]})
            for name, kind in columns.items()
        ]
    )


_WHERE = {"prompt_id": pa.string(), "step": pa.int32(), "iteration": pa.int32()}
_NUMBERS = dict.fromkeys(MEASURES, pa.float64()) | {"settled_prefix": pa.int32()}
ITERATIONS = _schema(**_WHERE, **_NUMBERS)


def trajectory_schema(dtype: torch.dtype) -> pa.Schema:
    """The columns of ``trajectory.parquet``; log-probabilities in the precision of the run."""
    return _schema(
        **_WHERE,
        position=pa.int32(),
        token_id=pa.int32(),
        token=pa.string(),
        log_prob=pa.float64() if dtype == torch.float64 else pa.float32(),
    )


@dataclass
class Pass:
    """One pass over some rows of a window."""

    rows: list[int]
    log_probs: Tensor  # (R, T)
    measures: Measures  # R numbers each


@dataclass
class Step:
    """One generation step: its window, and its passes."""

    window: Window
    final: Tensor | None = None  # (B, T) the fixed point, where it can be known beforehand
    exponents: list[float | None] | None = None  # Lyapunov's, where they came with it
    plain_nll: list[float] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)

    def of(self, row: int) -> list[tuple[Pass, int]]:
        """The passes over one row, each with the row's place in it."""
        return [(p, p.rows.index(row)) for p in self.passes if row in p.rows]


@dataclass
class Records:
    """All passes over a batch of prompts.

    Attributes:
        tolerance: nats from where an estimate ends that count as settled.
    """

    prompts: list[EncodedPrompt]
    steps: list[Step]
    tolerance: float

    def tables(self, tokens: list[list[int]], encoding: Tokenizer) -> tuple[Any, Any]:
        """(trajectory, iterations), each prompt after the other.

        Positions count from the beginning of the text; the first of a window, which nothing
        predicts, has no log-probability.
        """
        prompt, step_, number_, position, value, unpredicted = [], [], [], [], [], []
        for step in self.steps:
            window = step.window
            for number, recorded in enumerate(step.passes, start=1):
                rows = np.asarray(recorded.rows)
                lengths = np.asarray(window.lengths)[rows]
                local = np.arange(recorded.log_probs.size(1))
                valid = local < lengths[:, None]  # (R, T)
                places = np.broadcast_to(local, valid.shape)[valid]
                value.append(recorded.log_probs.numpy()[valid])
                prompt.append(np.repeat(np.asarray(window.rows)[rows], lengths))
                position.append(places + np.repeat(np.asarray(window.starts)[rows], lengths))
                unpredicted.append(places == 0)
                step_.append(np.full(len(places), window.step))
                number_.append(np.full(len(places), number))
        order = np.argsort(np.concatenate(prompt), kind="stable")
        prompts = np.concatenate(prompt)[order]
        positions = np.concatenate(position)[order]
        begins = np.cumsum([0] + [len(text) for text in tokens[:-1]])
        ids = np.concatenate([np.asarray(text) for text in tokens])[begins[prompts] + positions]
        kinds, which = np.unique(ids, return_inverse=True)
        names = pa.array([token_text(encoding, int(i)) for i in kinds], pa.string())
        log_probs = np.concatenate(value)[order]
        trajectory = pa.table(
            {
                "prompt_id": pa.array([p.id for p in self.prompts], pa.string()).take(prompts),
                "step": np.concatenate(step_)[order],
                "iteration": np.concatenate(number_)[order],
                "position": positions,
                "token_id": ids,
                "token": names.take(which),
                "log_prob": pa.array(log_probs, mask=np.concatenate(unpredicted)[order]),
            },
            schema=trajectory_schema(self.steps[0].passes[0].log_probs.dtype),
        )
        measured = [row for i in range(len(self.prompts)) for row in self._rows_of(i)]
        return trajectory, pa.Table.from_pylist(measured, schema=ITERATIONS)

    def _rows_of(self, index: int) -> list[dict[str, Any]]:
        """The rows of iterations.parquet of one prompt."""
        rows = []
        for step in self._steps_of(index):
            place = step.window.rows.index(index)
            passes = step.of(place)
            prefixes, _ = self._without_oracle(step, place)
            for number, (recorded, i) in enumerate(passes, start=1):
                row: dict[str, Any] = {
                    name: _number(values[i]) for name, values in recorded.measures.items()
                }
                if prefixes is not None:
                    row["settled_prefix"] = prefixes[number - 1]
                row |= {
                    "prompt_id": self.prompts[index].id,
                    "step": step.window.step,
                    "iteration": number,
                }
                rows.append(row)
        return rows

    def _steps_of(self, index: int) -> list[Step]:
        return [step for step in self.steps if index in step.window.rows]

    def _without_oracle(
        self, step: Step, place: int
    ) -> tuple[list[int] | None, list[float] | None]:
        """Settled prefixes, and errors where all has settled, judged by where the last pass ended.

        None where the fixed point is known, or too little is.
        """
        if step.final is not None:
            return None, None
        length = step.window.lengths[place]
        values = [recorded.log_probs[i, :length] for recorded, i in step.of(place)]
        if len(values) < 2:
            return None, None
        prefixes = settled_prefixes(values, tolerance=self.tolerance)
        if prefixes[-1] < length:
            return prefixes, None
        return prefixes, [(v - values[-1]).abs().max().item() for v in values]

    def _errors(self, step: Step, place: int, outcome: Outcome) -> list[float]:
        """The distance from the fixed point after each pass (nats); empty where it is unknown."""
        if step.final is None:
            if outcome is Outcome.SETTLED and len(step.of(place)) == 1:
                return [0.0]  # at rest where it began: nothing is fed back
            return self._without_oracle(step, place)[1] or []
        return [recorded.measures["oracle_error_max"][i] for recorded, i in step.of(place)]

    def summaries(
        self,
        result: Generation,
        feedback: Feedback,
        *,
        encoding: Tokenizer,
        double: LanguageModel | None,
    ) -> list[dict[str, Any]]:
        """What became of each prompt.

        Over several generation steps, the outcome is the worst and iterations_to_tolerance the
        largest of them; everything else is of the last one, which holds the whole text.

        Args:
            double: the model in float64, for the Lyapunov exponents; None for none.
        """
        exponents: list[float | None] = [None] * len(self.prompts)
        lasts = [self._steps_of(index)[-1] for index in range(len(self.prompts))]
        if lasts[0].exponents is not None:
            exponents = lasts[0].exponents
        elif double is not None:
            places = [step.window.rows.index(i) for i, step in enumerate(lasts)]
            lengths = [step.window.lengths[p] for step, p in zip(lasts, places, strict=True)]
            tokens = torch.zeros(len(lasts), max(lengths), dtype=torch.long, device=double.device)
            for row, (step, place) in enumerate(zip(lasts, places, strict=True)):
                tokens[row, : lengths[row]] = step.window.tokens[place, : lengths[row]]
            exponents = lyapunov_exponents(double, tokens, feedback, lengths=lengths)
        return [
            self._summary(index, result, encoding) | {"lyapunov": exponent}
            for index, exponent in enumerate(exponents)
        ]

    def _summary(self, index: int, result: Generation, encoding: Tokenizer) -> dict[str, Any]:
        prompt, outcomes = self.prompts[index], result.outcomes[index]
        steps = self._steps_of(index)
        last = steps[-1]
        place = last.window.rows.index(index)
        passes = last.of(place)
        errors = [
            self._errors(step, step.window.rows.index(index), outcome)
            for step, outcome in zip(steps, outcomes, strict=True)
        ]
        reached = [iterations_to_tolerance(each, tolerance=self.tolerance) for each in errors]
        counts = [len(step.of(step.window.rows.index(index))) for step in steps]
        recorded, i = passes[-1]
        first, j = passes[0]
        plain = last.plain_nll[place] if last.plain_nll else first.measures["nll"][j]
        floor = rounding_floor(first.log_probs[j, : last.window.lengths[place]])
        generated = result.tokens[index][len(prompt.tokens) :]
        diverged = [
            {"step": step.window.step, "iteration": count}
            for step, count, outcome in zip(steps, counts, outcomes, strict=True)
            if outcome is Outcome.DIVERGED
        ]
        return {
            "prompt_id": prompt.id,
            "text": prompt.text,
            "prompt_tokens": len(prompt.tokens),
            "generated_tokens": len(generated),
            "generated_text": decode(encoding, generated),
            "outcome": max(outcomes, key=list(Outcome).index).value,
            "diverged_at": diverged[0] if diverged else None,
            "iterations": sum(counts),
            "iterations_to_tolerance": largest(reached),
            "reporting_tolerance": self.tolerance,
            "rate": contraction_rate(errors[-1], floor=floor),
            "nll": _number(recorded.measures["nll"][i]),
            "nll_plain": _number(plain),
            "kl_effect": _number(recorded.measures["kl_effect"][i]),
            "oracle_error_max": _number(recorded.measures["oracle_error_max"][i]),
        }


def overall(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """The run as a whole.

    The outcome is the worst, iterations_to_tolerance the largest (missing if any prompt's is);
    everything else is the mean over the prompts that have it.
    """
    order = [outcome.value for outcome in Outcome]
    summary: dict[str, Any] = {
        "outcome": max((prompt["outcome"] for prompt in prompts), key=order.index),
        "prompts": len(prompts),
        "iterations": sum(prompt["iterations"] for prompt in prompts),
        "iterations_to_tolerance": largest([p["iterations_to_tolerance"] for p in prompts]),
        "seconds": round(sum(prompt["seconds"] for prompt in prompts), 3),
    }
    for key in ("rate", "lyapunov", "nll", "nll_plain", "kl_effect", "oracle_error_max"):
        values = [prompt[key] for prompt in prompts if prompt[key] is not None]
        summary[key] = sum(values) / len(values) if values else None
    return summary


def largest(values: list[int | None]) -> int | None:
    """The largest of some counts; None if one of them is missing."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
