"""Compute one convergence run: its prompts, one after the other, into its folder."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from experiments.converge.identity import locate
from experiments.converge.prompts import EncodedPrompt, encode_prompts
from experiments.converge.publish import open_tracker, publish
from experiments.converge.recorder import Recorder, in_float64, overall
from experiments.converge.settings import ConvergeSettings, GenerationSettings
from experiments.runs.compute_once import ALONE, Asked, compute_once, finished_already, warn
from experiments.runs.folder import RunFolder
from experiments.settings import ConfigError
from experiments.sweeps import report
from stateful_gpt.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from stateful_gpt.device import DTYPES, choose_device
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.recompute import RecomputeConfig
from stateful_gpt.solving import Full, Sampling, Solver
from stateful_gpt.tokenizer import end_token
from stateful_gpt.windowed import Windowed


def converge(settings: ConvergeSettings, asked: Asked = ALONE) -> Path:
    """Compute one run unless it is finished already; returns its folder.

    Raises:
        ConfigError: settings that cannot be, before anything is written.
        RunError: the computation or the disk failed; ``status.json`` says so too.
    """
    try:
        device = choose_device(settings.device.name)
    except ValueError as error:
        raise ConfigError(f"device.name: {error}") from None
    located = locate(settings)
    folder = located.folder
    if finished_already(folder):
        return folder.path
    try:
        checkpoint = _checkpoint(
            settings.model.path,
            settings.model.tokenizer,
            settings.device.dtype,
            device,
            located.model,
        )
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from None
    feedback = _feedback(settings, checkpoint.model)
    prompts = encode_prompts(
        located.prompts,
        checkpoint.tokenizer,
        max_tokens=settings.prompts.max_tokens,
        block_size=checkpoint.model.config.block_size,
        vocab_size=checkpoint.model.config.vocab_size,
    )

    def compute(_: object) -> dict[str, Any]:
        summaries = _run_prompts(settings, folder, checkpoint, feedback, prompts, asked)
        summary = {
            "run_id": folder.id,
            "study": settings.study,
            "trained_passes": checkpoint.trained_passes,
            "overall": overall(summaries),
            "prompts": summaries,
        }
        folder.assemble(len(prompts), summary)
        return summary

    compute_once(
        folder,
        asked=asked,
        device=device,
        open_tracker=lambda: open_tracker(
            folder.config,
            folder.id,
            folder.path,
            tracking=settings.tracking,
            warn=warn,
            study=folder.path.parent,
        ),
        compute=compute,
        publish=lambda tracker, summary: publish(tracker, folder.path, summary),
        shorten="prompts.max_tokens",
    )
    return folder.path


def _run_prompts(
    settings: ConvergeSettings,
    folder: RunFolder,
    checkpoint: Checkpoint,
    feedback: Feedback,
    prompts: list[EncodedPrompt],
    asked: Asked,
) -> list[dict[str, Any]]:
    passes = settings.recompute.iterations * (settings.generation.max_new_tokens + 1)
    double = in_float64(checkpoint.model)
    summaries = []
    with tqdm(
        total=passes * len(prompts),
        unit="pass",
        desc=": ".join(filter(None, (asked.place, report.feedback_of(settings.plain())))),
        disable=None if asked.bar else True,  # None: off where nobody watches
    ) as bar:
        for number, prompt in enumerate(prompts):
            summary = folder.kept(number, prompt.id)
            if summary is None:
                summary = _run_prompt(
                    settings, folder, checkpoint, double, feedback, number, prompt, bar
                )
            summaries.append(summary)
            bar.n = passes * (number + 1)
            bar.refresh()
    return summaries


def _run_prompt(
    settings: ConvergeSettings,
    folder: RunFolder,
    checkpoint: Checkpoint,
    double: Any,
    feedback: Feedback,
    number: int,
    prompt: EncodedPrompt,
    bar: "tqdm[Any]",
) -> dict[str, Any]:
    encoding, generation = checkpoint.tokenizer, settings.generation
    device = checkpoint.model.lm_head.weight.device
    recorder = Recorder(
        prompt,
        model=checkpoint.model,
        feedback=feedback,
        settings=settings,
        on_pass=bar.update,
    )
    result = generate(
        checkpoint.model,
        [prompt.tokens],
        max_new_tokens=generation.max_new_tokens,
        feedback=feedback,
        config=RecomputeConfig(
            iterations=settings.recompute.iterations,
            tolerance=settings.recompute.tolerance,
            damping=settings.recompute.damping,
        ),
        solver=_solver(settings),
        start=Start(settings.recompute.start),
        sampling=Sampling(
            temperature=generation.temperature if generation.strategy == "sample" else None,
            top_k=generation.top_k,
            vocab_size=encoding.n_vocab,
            end_token=end_token(encoding),
        ),
        generator=torch.Generator(device).manual_seed(seed_of(settings.seed, generation, number)),
        on_window=recorder.window,
    )
    tokens = result.tokens[0]
    recorder.finish()
    summary = recorder.summary(tokens, result.outcomes[0], encoding=encoding, double=double)
    folder.keep(
        number, summary, recorder.trajectory_table(tokens, encoding), recorder.iterations_table()
    )
    return summary


def seed_of(seed: int, generation: GenerationSettings, number: int) -> int:
    """Of the random numbers of one prompt, whose stream no other prompt and no other seed has: it
    does not matter which prompts were computed before.
    """
    sequence = np.random.SeedSequence([seed, generation.seed], spawn_key=[number])
    return int(sequence.generate_state(1, np.uint64)[0])


def _feedback(settings: ConvergeSettings, model: GPT) -> Feedback:
    chosen = settings.feedback
    n_layer = model.config.n_layer
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
    if feedback.of_hidden and model.gate is None:
        raise ConfigError(
            "feedback: hidden states need a model with a gate for them, such as"
            f" model=bundled_stateful; {settings.model.path!r} has none"
        )
    return feedback


def _solver(settings: ConvergeSettings) -> Solver:
    if settings.recompute.solver == "windowed":
        return Windowed(settings.recompute.window)
    return Full()


@lru_cache(maxsize=1)
def _checkpoint(
    path: str, tokenizer: str | None, dtype: str, device: torch.device, _identity: str
) -> Checkpoint:
    """Kept between the jobs of a sweep in one process, while the files stay the same."""
    in_float64.cache_clear()  # before there are two models
    return load_checkpoint(path, tokenizer=tokenizer, dtype=DTYPES[dtype], device=device)
