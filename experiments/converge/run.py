"""Compute one convergence run into its folder, a batch of prompts at a time."""

import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.converge.identity import locate
from experiments.converge.prompts import EncodedPrompt, encode_prompts
from experiments.converge.publish import Live, open_tracker, publish
from experiments.converge.recorder import Recorder
from experiments.converge.records import ITERATIONS, Measures, overall, trajectory_schema
from experiments.converge.settings import ConvergeSettings, ModelSettings
from experiments.runs.compute_once import ALONE, Asked, RunError, compute_once, finished_already
from experiments.runs.folder import RunFolder
from experiments.settings import ConfigError
from experiments.sweeps.report import feedback_of
from experiments.tracking.tracker import Tracker
from stateful_gpt.checkpoint import Checkpoint, CheckpointError, load_model
from stateful_gpt.console import cut, exhausted
from stateful_gpt.device import DTYPES
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import Sampling, Start, generate
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.recompute import RecomputeConfig

# What a batch may take beside the model, in bytes: two distributions over the vocabulary for every
# token, and keys and values of the text, of its exact reading and of the copies of the Lyapunov
# exponent, these in float64. One prompt is always read, whatever it takes.
BATCH_MEMORY = 2 * 2**30
COPIES = 6  # of a text that the Lyapunov exponent holds at one time


def rows_that_fit(model: LanguageModel, length: int, settings: ConvergeSettings) -> int:
    """How many prompts of ``length`` tokens are computed together, by BATCH_MEMORY."""
    size = 8 if settings.device.dtype == "float64" else 4
    keys = 2 * model.n_layer * model.width * length
    distributions = 2 * model.vocab_size * length * size if settings.measures.kl else 0
    copies = keys * 8 * COPIES if settings.measures.lyapunov else 0
    return max(1, BATCH_MEMORY // (distributions + 2 * keys * size + copies))


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

            for summaries in _batches(settings, folder, checkpoint, feedback, prompts, on_pass):
                live.end_batch(len(summaries))
                bar.update(passes * len(summaries) - bar.n)
        folder.assemble()
        summary = {
            "run_id": folder.id,
            "study": settings.study,
            "trained_passes": checkpoint.trained_passes,
            "overall": overall(summaries),
            "prompts": summaries,
        }
        folder.summarize(summary)
        return lambda: publish(tracker, folder.path, summary)

    compute_once(
        folder,
        asked=asked,
        device=device,
        origin={"model": checkpoint.source, "model_hash": known[settings.model]},
        open_tracker=lambda: open_tracker(
            folder.config, folder.id, folder.path, tracking=settings.tracking
        ),
        compute=compute_run,
        shorten="prompts.max_tokens or device.batch, or measures.lyapunov=false",
    )
    return folder.path


def _batches(
    settings: ConvergeSettings,
    folder: RunFolder,
    checkpoint: Checkpoint[Any],
    feedback: Feedback,
    prompts: list[EncodedPrompt],
    on_pass: Callable[[int, int, Measures, int], object],
) -> Iterator[list[dict[str, Any]]]:
    """After each batch, the summaries of all prompts done; what is kept is not computed again."""
    model, encoding, generation = checkpoint.model, checkpoint.tokenizer, settings.generation
    double = _in_float64(model) if settings.measures.lyapunov else None
    size = settings.device.batch
    if size == "auto":
        longest = max(len(prompt.tokens) for prompt in prompts) + generation.max_new_tokens
        size = rows_that_fit(model, min(longest, model.block_size), settings)
    sampling = Sampling(
        temperature=generation.temperature if generation.strategy == "sample" else None,
        top_k=generation.top_k,
        vocab_size=encoding.n_vocab,
        end_tokens=encoding.end_tokens,
    )
    schemas = (trajectory_schema(model.dtype), ITERATIONS)
    done: list[dict[str, Any]] = []
    while (first := len(done)) < len(prompts):
        summaries = folder.kept(first, schemas)
        if summaries is None:
            started = time.monotonic()
            batch = prompts[first : first + int(size)]
            recorder = Recorder(
                batch,
                checkpoint=checkpoint,
                feedback=feedback,
                settings=settings,
                double=double,
                on_pass=on_pass,
            )
            result = generate(
                model,
                [prompt.tokens for prompt in batch],
                max_new_tokens=generation.max_new_tokens,
                feedback=feedback,
                config=RecomputeConfig(
                    **settings.recompute.model_dump(exclude={"solver", "start"})
                ),
                start=Start(settings.recompute.start),
                sampling=sampling,
                generators=[
                    generator(settings, first + i, model.device) for i in range(len(batch))
                ],
                slide=generation.slide,
                watch=recorder.watch,
            )
            records = recorder.records
            summaries = records.summaries(result, recorder.exponents())
            seconds = round((time.monotonic() - started) / len(batch), 3)
            summaries = [summary | {"seconds": seconds} for summary in summaries]
            folder.keep(first, summaries, records.trajectory(), records.iterations())
        done += summaries
        yield done


def generator(settings: ConvergeSettings, prompt: int, device: torch.device) -> torch.Generator:
    """A prompt's own stream of random numbers, which no other prompt and no other seed has: it does
    not matter which prompts it is computed with.
    """
    sequence = np.random.SeedSequence([settings.seed, settings.generation.seed], spawn_key=[prompt])
    return torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def _feedback(settings: ConvergeSettings, model: LanguageModel) -> Feedback:
    chosen = settings.feedback
    if chosen.layers != "all" and max(chosen.layers) >= model.n_layer:
        raise ConfigError(
            f"feedback.layers must be from 0 to {model.n_layer - 1} for this model, got"
            f" {list(chosen.layers)}"
        )
    feedback = Feedback.of_kind(
        chosen.kind,
        chosen.strength,
        layers=None if chosen.layers == "all" else frozenset(chosen.layers),
        hidden_strength=chosen.hidden_strength,
        shift=chosen.shift,
    )
    if feedback.of_hidden and not model.takes_hidden_states:
        raise ConfigError(
            "feedback: hidden states need a model with a gate for them, such as"
            f" model=bundled_stateful; {cut(repr(settings.model.path))} has none"
        )
    return feedback


@lru_cache(maxsize=1)
def _in_float64(model: LanguageModel) -> LanguageModel:
    """Kept for the next run of a sweep."""
    try:
        return model.in_float64()
    except CheckpointError as error:
        raise RunError(f"{error}: choose measures.lyapunov=false") from None


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
