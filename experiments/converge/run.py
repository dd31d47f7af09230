"""Study how a GPT's estimates of its tokens settle when they are fed back: one run, or a sweep.

    python -m experiments.converge feedback.strength=0.5
    python -m experiments.converge -m feedback.strength=-1,0,1 recompute.iterations=32

One run is one configuration and one folder, ``<runs_dir>/<study>/<run_id>/``. A finished run is
not computed again; a failed or killed one carries on with its first unfinished prompt.
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.command import CONF, RunError, run_command, saying_why
from experiments.converge.identity import Located
from experiments.converge.prompts import EncodedPrompt, encode_prompts
from experiments.converge.publish import open_tracker, publish
from experiments.converge.recorder import Recorder, in_float64, overall
from experiments.converge.settings import ConvergeSettings
from experiments.runs.failure import disk_sentence, no_locks, record_failure, warn
from experiments.runs.folder import RunFolder, tidy
from experiments.runs.provenance import changes, provenance
from experiments.settings import ConfigError, to_settings
from experiments.sweeps import launchers, report, sweep
from experiments.sweeps.study import survey
from experiments.sweeps.sweep import Sweep
from experiments.sweeps.sweeper import prefer_our_sweeper
from experiments.tracking.tracker import Tracker
from stateful_gpt.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from stateful_gpt.device import DTYPES, choose_device
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.recompute import RecomputeConfig
from stateful_gpt.solving import Full, Sampling, Solver
from stateful_gpt.tokenizer import end_token
from stateful_gpt.windowed import Windowed


def converge(settings: ConvergeSettings) -> Path:
    """Compute one run unless it is finished already; returns its folder.

    Raises:
        ConfigError: settings that cannot be, before anything is written.
        RunError: the computation or the disk failed; ``status.json`` says so too.
    """
    try:
        device = choose_device(settings.device.name)
    except ValueError as error:
        raise ConfigError(f"device.name: {error}") from None
    located = Located(settings)
    folder, prompts = located.folder, located.prompts
    if folder.finished:
        tidy(folder.path)
        print(f"{folder.path} is finished: nothing to compute")
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
    encoded = encode_prompts(
        prompts,
        checkpoint.tokenizer,
        max_tokens=settings.prompts.max_tokens,
        block_size=checkpoint.model.config.block_size,
        vocab_size=checkpoint.model.config.vocab_size,
    )
    try:
        with folder.locked(
            lambda: print(f"{folder.path} is being computed elsewhere: waiting", flush=True),
            lambda: warn(no_locks(folder.path)),
        ):
            if folder.finished:
                print(f"{folder.path} was finished meanwhile: nothing to compute")
                return folder.path
            _compute(settings, folder, checkpoint, feedback, encoded)
    except OSError as error:
        raise RunError(disk_sentence(error, folder.path)) from None
    return folder.path


def _compute(
    settings: ConvergeSettings,
    folder: RunFolder,
    checkpoint: Checkpoint,
    feedback: Feedback,
    prompts: list[EncodedPrompt],
) -> None:
    device = checkpoint.model.lm_head.weight.device
    changed = changes()
    folder.begin(settings, provenance(device), changes=changed.patch if changed else b"")
    tracker: Tracker | None = None
    try:
        tracker = open_tracker(
            settings.plain(),
            folder.id,
            folder.path,
            tracking=settings.tracking,
            warn=warn,
            study=folder.path.parent,
        )
        summaries = _run_prompts(settings, folder, checkpoint, feedback, prompts)
        summary = {
            "run_id": folder.id,
            "study": settings.study,
            "trained_passes": checkpoint.trained_passes,
            "overall": overall(summaries),
            "prompts": summaries,
        }
        folder.assemble(len(prompts), summary)
        publish(tracker, folder.path, summary)
        tracker.finish()
        folder.finish()
    except BaseException as error:
        if tracker is not None:
            tracker.finish(failed=True)
        message = record_failure(error, folder, shorten="prompts.max_tokens")
        if isinstance(error, Exception):
            raise RunError(message) from error
        raise


def _run_prompts(
    settings: ConvergeSettings,
    folder: RunFolder,
    checkpoint: Checkpoint,
    feedback: Feedback,
    prompts: list[EncodedPrompt],
) -> list[dict[str, Any]]:
    passes = settings.recompute.iterations * (settings.generation.max_new_tokens + 1)
    double = in_float64(checkpoint.model)
    summaries = []
    with tqdm(
        total=passes * len(prompts),
        unit="pass",
        desc=report.feedback_of(settings.plain()),
        disable=None if sweep.alone() else True,  # None: off where nobody watches
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
        # each prompt draws from its own stream: it does not matter which were done before
        generator=torch.Generator(device).manual_seed(
            settings.seed * 1_000_003 + generation.seed * 1_009 + number
        ),
        on_window=recorder.window,
    )
    tokens = result.tokens[0]
    recorder.finish()
    summary = recorder.summary(tokens, result.outcomes[0], encoding=encoding, double=double)
    folder.keep(
        number, summary, recorder.trajectory_table(tokens, encoding), recorder.iterations_table()
    )
    return summary


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


@hydra.main(config_path=CONF, config_name="converge", version_base="1.3")
def _job(config: DictConfig) -> None:
    if not sweep.run_cell(config, converge):
        with saying_why():
            converge(to_settings(config, ConvergeSettings))


def main() -> int:
    launchers.prefer_our_settings()
    prefer_our_sweeper()
    Sweep.current = None
    Sweep.rehearsal = "--dry-run" in sys.argv[1:]
    if Sweep.rehearsal:
        sys.argv.remove("--dry-run")
    return run_command(_launch, after=_after)


def _launch() -> None:
    try:
        _job()
    except Exception as error:
        if Sweep.current is None or not Sweep.current.parallel:
            raise
        raise sweep.break_off(error) from error


def _after(config: DictConfig) -> int:
    """How the study stands once all jobs are done, and what to type next."""
    current = Sweep.current
    code = current.close() if current is not None else 0
    studies = current.studies() if current else [Path(config.runs_dir) / config.study]
    for path in studies:
        if path.is_dir():
            print(f"\n{report.report(survey(path))}")
    return code
