"""Study how a GPT's estimates of its tokens settle when they are fed back: one run, or a sweep.

    python -m experiments.converge feedback.strength=0.5
    python -m experiments.converge -m feedback.strength=-1,0,1 recompute.iterations=32

One run is one configuration and one folder, ``<runs_dir>/<study>/<run_id>/``. A finished run is
not computed again; a failed or killed one carries on with its first unfinished prompt.
"""

import hashlib
import shlex
import sys
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from experiments import report
from experiments.command import CONF, RunError, run_command, saying_why
from experiments.config import (
    ConfigError,
    ConvergeSettings,
    ModelSettings,
    register_schemas,
    to_settings,
)
from experiments.measure import Recorder, in_float64, overall
from experiments.prompts import EncodedPrompt, content_hash, encode_prompts, read_prompts
from experiments.provenance import provenance
from experiments.publish import open_tracker, publish
from experiments.run_folder import RunFolder, run_id
from experiments.tracking import Tracker
from stateful_gpt.checkpoint import Checkpoint, CheckpointError, fingerprint, load_checkpoint
from stateful_gpt.device import DTYPES, choose_device
from stateful_gpt.feedback import FeedbackKind, TokenFeedback
from stateful_gpt.generate import Full, Sampling, Solver, Start, generate
from stateful_gpt.recompute import RecomputeConfig
from stateful_gpt.tokenizer import end_token
from stateful_gpt.windowed import Windowed


def converge(settings: ConvergeSettings) -> Path:
    """Compute one run unless it is finished already; returns its folder.

    Raises:
        ConfigError: settings that cannot be, before anything is written.
        RunError: the computation or the disk failed; ``status.json`` says so too.
    """
    settings.check()
    try:
        device = choose_device(settings.device.name)
    except ValueError as error:
        raise ConfigError(f"device.name: {error}") from None
    identity = _identity(settings.model)
    prompts = read_prompts(settings.prompts)
    folder = RunFolder(settings, run_id(settings, model=identity, prompts=content_hash(prompts)))
    if folder.finished:
        print(f"{folder.path} is finished: nothing to compute")
        return folder.path
    try:
        checkpoint = _checkpoint(
            settings.model.path, settings.model.tokenizer, settings.device.dtype, device, identity
        )
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from None
    feedback = _feedback(settings, n_layer=checkpoint.model.config.n_layer)
    encoded = encode_prompts(
        prompts,
        checkpoint.tokenizer,
        max_tokens=settings.prompts.max_tokens,
        block_size=checkpoint.model.config.block_size,
        vocab_size=checkpoint.model.config.vocab_size,
    )
    try:
        with folder.locked(lambda: print(f"{folder.path} is being computed elsewhere: waiting")):
            if folder.finished:
                print(f"{folder.path} was finished meanwhile: nothing to compute")
                return folder.path
            _compute(settings, folder, checkpoint, feedback, encoded)
    except OSError as error:
        raise RunError(_disk_sentence(error, folder.path)) from None
    return folder.path


def _compute(
    settings: ConvergeSettings,
    folder: RunFolder,
    checkpoint: Checkpoint,
    feedback: TokenFeedback,
    prompts: list[EncodedPrompt],
) -> None:
    device = checkpoint.model.lm_head.weight.device
    folder.begin(settings, provenance(device))
    tracker: Tracker | None = None
    try:
        tracker = open_tracker(
            asdict(settings),
            folder.id,
            folder.path,
            tracking=settings.tracking,
            warn=_warn,
            study=folder.path.parent,
        )
        summaries = _run_prompts(settings, folder, checkpoint, feedback, prompts)
        summary = {
            "run_id": folder.id,
            "study": settings.study,
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
        message = _why(error, folder.path)
        try:
            folder.fail(message)
        except OSError:
            _warn(f"{folder.path / 'status.json'} could not be written either")
        if isinstance(error, Exception):
            raise RunError(message) from error
        raise


def _run_prompts(
    settings: ConvergeSettings,
    folder: RunFolder,
    checkpoint: Checkpoint,
    feedback: TokenFeedback,
    prompts: list[EncodedPrompt],
) -> list[dict[str, Any]]:
    passes = settings.recompute.iterations * (settings.generation.max_new_tokens + 1)
    double = in_float64(checkpoint.model)
    summaries = []
    with tqdm(
        total=passes * len(prompts), unit="pass", desc=f"β = {feedback.strength:g}", disable=None
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
    feedback: TokenFeedback,
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
    summary = recorder.summary(tokens, result.outcomes[0], encoding=encoding, double=double)
    folder.keep(
        number, summary, recorder.trajectory_table(tokens, encoding), recorder.iterations_table()
    )
    return summary


def _feedback(settings: ConvergeSettings, *, n_layer: int) -> TokenFeedback:
    layers = settings.feedback.layers
    if layers != "all" and max(layers) >= n_layer:
        raise ConfigError(
            f"feedback.layers must be from 0 to {n_layer - 1} for this model, got {list(layers)}"
        )
    return TokenFeedback(
        kind=FeedbackKind(settings.feedback.kind),
        strength=settings.feedback.strength,
        layers=None if layers == "all" else frozenset(layers),
    )


def _identity(model: ModelSettings) -> str:
    """A hash of the model, and of the tokenizer where that is not the model's own."""
    try:
        weights = fingerprint(model.path)
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"model.path {model.path!r} cannot be read ({error.strerror or error})"
        ) from None
    if model.tokenizer is None:
        return weights
    try:
        named = model.tokenizer in ("gpt2", "byte")
        content = model.tokenizer.encode() if named else Path(model.tokenizer).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"model.tokenizer must be gpt2, byte or a readable file, got {model.tokenizer!r}"
            f" ({error.strerror or error})"
        ) from None
    return f"{weights} {hashlib.sha256(content).hexdigest()}"


def _solver(settings: ConvergeSettings) -> Solver:
    if settings.recompute.solver == "windowed":
        return Windowed(settings.recompute.window)
    return Full()


@lru_cache(maxsize=1)
def _checkpoint(
    path: str, tokenizer: str | None, dtype: str, device: torch.device, _identity: str
) -> Checkpoint:
    """Kept between the jobs of a sweep in one process, while the files stay the same."""
    return load_checkpoint(path, tokenizer=tokenizer, dtype=DTYPES[dtype], device=device)


def _why(error: BaseException, folder: Path) -> str:
    if isinstance(error, OSError):
        return _disk_sentence(error, folder)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, torch.OutOfMemoryError):
        return "the device's memory does not hold the run: use a shorter prompts.max_tokens"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _disk_sentence(error: OSError, folder: Path) -> str:
    place = error.filename or folder
    return f"runs_dir: {str(place)!r} cannot be written ({error.strerror or error})"


def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)


@hydra.main(config_path=CONF, config_name="converge", version_base="1.3")
def _job(config: DictConfig) -> None:
    with saying_why():
        converge(to_settings(config, ConvergeSettings))


def main() -> int:
    register_schemas()
    return run_command(_job, after=_after)


def _after(config: DictConfig) -> None:
    """What is shown once all jobs are done: their study as a table, and what to type next."""
    study = Path(config.runs_dir) / config.study
    if not study.is_dir():
        return
    print(f"\n{report.table(study)}")
    figures = shlex.quote(str(Path("figures") / config.study))
    print(f"\nDraw it:  python -m analysis figures {shlex.quote(str(study))} --out {figures}")


if __name__ == "__main__":
    sys.exit(main())
