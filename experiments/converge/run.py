"""Compute one convergence run into its folder."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from experiments.converge.batches import compute
from experiments.converge.identity import locate
from experiments.converge.prompts import encode_prompts
from experiments.converge.publish import Live, open_tracker, publish
from experiments.converge.records import Measures, overall
from experiments.converge.settings import ConvergeSettings, ModelSettings
from experiments.runs.compute_once import ALONE, Asked, RunError, compute_once, finished_already
from experiments.settings import ConfigError
from experiments.sweeps.report import feedback_of
from experiments.tracking.tracker import Tracker
from stateful_gpt.checkpoint import Checkpoint, CheckpointError, load_model
from stateful_gpt.console import cut, exhausted
from stateful_gpt.device import DTYPES
from stateful_gpt.feedback import Feedback
from stateful_gpt.language_model import LanguageModel


def converge(settings: ConvergeSettings, asked: Asked = ALONE) -> Path:
    """Compute one run unless it is finished already; returns its folder.

    Raises:
        ConfigError: settings that cannot be, before anything is written.
        RunError: the computation or the disk failed; ``status.json`` says so too.
    """
    device = settings.device.found()
    known: dict[Any, Any] = {}
    folder = locate(settings, known)
    if finished_already(folder):
        return folder.path
    try:
        checkpoint = _checkpoint(
            settings.model, settings.device.dtype, device, known[settings.model]
        )
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from None
    except (MemoryError, RuntimeError) as error:
        if (whose := exhausted(error)) is None:
            raise
        raise RunError(
            f"{whose} does not hold the model: use a smaller one, or device.dtype=bfloat16"
        ) from None
    model: Any = checkpoint.model  # hashed by which object it is
    feedback = _feedback(settings, model)
    prompts = encode_prompts(
        known[settings.prompts][0],
        checkpoint.tokenizer,
        max_tokens=settings.prompts.max_tokens,
        block_size=model.block_size,
        vocab_size=model.vocab_size,
    )

    def compute_run(tracker: Tracker) -> Callable[[], object]:
        live = Live(tracker, settings)
        passes = settings.recompute.iterations * (settings.generation.max_new_tokens + 1)
        name = feedback_of(folder.config)
        with asked.progress(passes * len(prompts), "pass", name) as bar:

            def on_pass(step: int, number: int, measures: Measures, at_rest: int) -> None:
                live(step, number, measures, at_rest)
                bar.update(len(measures["nll"]))
                bar.set_postfix_str(f"pass {number}, {at_rest} of {len(measures['nll'])} at rest")

            def on_batch(done: int) -> None:
                live.end_batch(done)
                bar.update(passes * done - bar.n)

            double = _in_float64(model) if settings.measures.lyapunov else None
            summaries = compute(
                *(settings, folder, checkpoint, double, feedback, prompts),
                on_pass=on_pass,
                on_batch=on_batch,
            )
        folder.assemble()
        summary = {
            "run_id": folder.id,
            "study": settings.study,
            "trained_passes": checkpoint.trained_passes,
            "overall": overall(summaries),
            "prompts": summaries,
        }
        folder.summarize(summary)
        return lambda: publish(tracker, folder.path, summary, live=live)

    compute_once(
        folder,
        asked=asked,
        device=device,
        origin={"model": checkpoint.source},
        open_tracker=lambda: open_tracker(
            folder.config,
            folder.id,
            folder.path,
            tracking=settings.tracking,
            study=folder.path.parent,
        ),
        compute=compute_run,
        shorten="prompts.max_tokens or device.batch",
    )
    return folder.path


def _feedback(settings: ConvergeSettings, model: LanguageModel) -> Feedback:
    chosen = settings.feedback
    n_layer = model.n_layer
    if chosen.layers != "all" and max(chosen.layers) >= n_layer:
        raise ConfigError(
            f"feedback.layers must be from 0 to {n_layer - 1} for this model, got"
            f" {list(chosen.layers)}"
        )
    feedback = Feedback.of_kind(
        chosen.kind,
        chosen.strength,
        layers=None if chosen.layers == "all" else frozenset(chosen.layers),
        hidden_strength=chosen.hidden_strength,
        shift=0 if chosen.shift == 0 else 1,
    )
    if feedback.of_hidden and not model.takes_hidden_states:
        raise ConfigError(
            "feedback: hidden states need a model with a gate for them, such as"
            f" model=bundled_stateful; {cut(repr(settings.model.path))} has none"
        )
    return feedback


@lru_cache(maxsize=1)
def _in_float64(model: Any) -> LanguageModel:
    """Kept for the next run of a sweep."""
    double: LanguageModel = model.in_float64()
    return double


@lru_cache(maxsize=1)
def _checkpoint(
    model: ModelSettings, dtype: str, device: torch.device, _identity: str
) -> Checkpoint[LanguageModel]:
    """Kept between the jobs of a sweep in one process, while the files stay the same."""
    _in_float64.cache_clear()  # before there are two models
    return load_model(
        model.path,
        library=model.library,
        tokenizer=model.tokenizer,
        dtype=DTYPES[dtype],
        device=device,
    )
