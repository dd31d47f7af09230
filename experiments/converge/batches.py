"""Computes the prompts of a run, a batch at a time, and keeps each batch as soon as it is done."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from experiments.converge.prompts import EncodedPrompt
from experiments.converge.recorder import Recorder
from experiments.converge.records import ITERATIONS, Measures, trajectory_schema
from experiments.converge.settings import ConvergeSettings
from experiments.runs.folder import RunFolder
from stateful_gpt.checkpoint import Checkpoint
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


def compute(
    settings: ConvergeSettings,
    folder: RunFolder,
    checkpoint: Checkpoint[LanguageModel],
    double: LanguageModel | None,
    feedback: Feedback,
    prompts: list[EncodedPrompt],
    *,
    on_pass: Callable[[int, int, Measures, int], object],
    on_batch: Callable[[int], object],
) -> list[dict[str, Any]]:
    """The summaries of all prompts; what an earlier attempt has kept is not computed again.

    ``double`` and ``on_pass`` are as in ``Recorder``; ``on_batch`` gets the number of prompts done.
    """
    model, encoding = checkpoint.model, checkpoint.tokenizer
    generation, asked = settings.generation, settings.recompute
    longest = max(len(prompt.tokens) for prompt in prompts) + generation.max_new_tokens
    size = settings.device.batch
    if size == "auto":
        size = rows_that_fit(model, min(longest, model.block_size), settings)
    config = RecomputeConfig(**asked.model_dump(exclude={"solver", "start"}))
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
                config=config,
                start=Start(asked.start),
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
        on_batch(len(done))
    return done


def generator(settings: ConvergeSettings, prompt: int, device: torch.device) -> torch.Generator:
    """A prompt's own stream of random numbers, which no other prompt and no other seed has: it does
    not matter which prompts it is computed with.
    """
    seeds = [settings.seed, settings.generation.seed]
    sequence = np.random.SeedSequence(seeds, spawn_key=[prompt])
    return torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
