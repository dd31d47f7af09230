"""Train one model, into its folder."""

import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from experiments.runs.compute_once import ALONE, Asked, RunError, warn
from experiments.runs.files import (
    remove_partial,
    short_hash,
    write_atomically,
    write_json,
    write_text,
)
from experiments.runs.lock import LOCK, locked
from experiments.settings import ConfigError
from experiments.tracking.tracker import Tracker
from experiments.train.corpus import Corpus, documents, read_texts, stream
from experiments.train.loop import HISTORY, STATE, Training
from experiments.train.model_card import model_card
from experiments.train.settings import TrainSettings
from stateful_gpt.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from stateful_gpt.device import choose_device
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.tokenizer import (
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)

CONFIG = "training.yaml"
TOKENIZER = "tokenizer.json"
DEPTHS = "depths.json"
CARD = "README.md"

MEASURES = ("train_loss", "held_out_*", "tokens_read", "nll_by_depth/*", "kl_by_depth/*")
# settings that say where and how fast, not what is trained
_FREE = ("output", "device", "tracking")


def train(settings: TrainSettings, asked: Asked = ALONE) -> Path:
    """Train as configured unless that is done; returns the model folder.

    Raises:
        ConfigError: settings that cannot be, or an output folder that holds another training.
        RunError: a file cannot be written.
    """
    try:
        device = choose_device(settings.device.name)
    except ValueError as error:
        raise ConfigError(f"device.name: {error}") from None
    try:
        architecture = GPTConfig(**settings.architecture.plain())
    except ValueError as error:
        raise ConfigError(f"architecture.{error}") from None
    texts = read_texts("corpus.train", settings.corpus.train)
    held_out_texts = read_texts("corpus.held_out", settings.corpus.held_out)
    origin = _starting_point(settings, architecture)
    output = Path(settings.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output {str(output)!r} cannot be written ({error.strerror or error})"
        ) from None
    try:
        with locked(
            output,
            on_wait=lambda: print(f"{output} is being trained elsewhere: waiting", flush=True),
            on_no_locks=lambda: warn(f"{output} is where files have no locks: never start twice"),
        ):
            _claim(output, settings)
            if (output / CARD).exists():
                print(f"{output} is trained already: nothing to do")
            else:
                _train(settings, architecture, origin, device, texts, held_out_texts)
    except OSError as error:
        raise RunError(
            f"output: {str(error.filename or output)!r} cannot be written"
            f" ({error.strerror or error})"
        ) from None
    return output


def _train(
    settings: TrainSettings,
    architecture: GPTConfig,
    origin: Checkpoint[GPT] | None,
    device: torch.device,
    texts: list[str],
    held_out_texts: list[str],
) -> None:
    output = Path(settings.output)
    encoding: Any = origin.tokenizer if origin is not None else _tokenizer(settings, texts, output)
    if encoding.n_vocab > architecture.vocab_size:
        raise ConfigError(
            f"architecture.vocab_size must be at least the tokenizer's {encoding.n_vocab} ids,"
            f" got {architecture.vocab_size}"
        )
    corpus = _corpus("corpus.train", texts, encoding, settings)
    held_out = _corpus("corpus.held_out", held_out_texts, encoding, settings)
    tracker = _open_tracker(settings, output)
    try:
        training = Training(settings, architecture, origin, device, corpus, output)
        training.run(held_out, tracker)
        save_checkpoint(
            training.model,
            output,
            tokenizer=encoding.name if encoding.name in ("gpt2", "byte") else encoding,
            dtype=torch.float16,
            trained_passes=settings.training.passes if architecture.hidden_feedback else None,
        )
        # the loss that counts is that of the rounded weights in the file
        profile = training.profile(
            load_checkpoint(output, device=device).model,
            held_out,
            full=architecture.hidden_feedback,
            windows=settings.training.final_windows,
        )
        length = held_out.characters_per_prediction
        depths = {  # losses in nats per token
            "trained_passes": settings.training.passes,
            "nll": profile.nll,
            "kl": profile.kl,
            "nll_full": profile.nll_full,
            "contracts": profile.broken_at is None,
            "broken_at": profile.broken_at,
            "tokens": profile.tokens,
            "characters_per_token": length,
        }
        write_json(output / DEPTHS, depths)
        loss = f"{profile.nll[0] / length:.4f}"
        loss_full = None if profile.nll_full is None else f"{profile.nll_full / length:.4f}"
        card = model_card(settings, training, nats=loss, nats_full=loss_full)
        write_text(output / CARD, card)
        tracker.summarize({"held_out_nats_per_character": profile.nll[0] / length})
    except BaseException:
        tracker.finish(failed=True)
        raise
    tracker.finish()
    fed_back = "" if loss_full is None else f", {loss_full} with hidden states fed back"
    print(f"{output}: held out {loss} nats per character{fed_back}")


def _starting_point(settings: TrainSettings, architecture: GPTConfig) -> Checkpoint[GPT] | None:
    """The model that training starts from; its shape must be the one that is asked for."""
    if settings.start_from is None:
        return None
    try:
        origin = load_checkpoint(settings.start_from)
    except CheckpointError as error:
        raise ConfigError(f"start_from: {error}") from None
    found = origin.model.config
    for name, wanted in asdict(architecture).items():
        value = getattr(found, name)
        if name == "hidden_feedback" and wanted and not value:
            continue  # it gets a gate
        if name != "dropout" and value != wanted:
            raise ConfigError(
                f"architecture.{name} must be {value}, as in start_from={settings.start_from},"
                f" got {wanted}"
            )
    return origin


def _corpus(key: str, texts: list[str], encoding: Tokenizer, settings: TrainSettings) -> Corpus:
    block = settings.architecture.block_size
    if settings.corpus.documents == "line":
        return documents(key, texts, encoding, block_size=block)
    corpus = stream(texts, encoding, block_size=block)
    if len(corpus.tokens) <= block:
        raise ConfigError(
            f"{key} has {len(corpus.tokens)} tokens, fewer than one window of"
            f" architecture.block_size={block}"
        )
    return corpus


def deciding(settings: TrainSettings) -> dict[str, Any]:
    """What is trained, wherever."""
    return {key: value for key, value in settings.plain().items() if key not in _FREE}


def _claim(output: Path, settings: TrainSettings) -> None:
    """Make the output folder ours, or find that it holds this very training."""
    wanted = deciding(settings)
    path = output / CONFIG
    for name in (CONFIG, TOKENIZER, STATE, HISTORY, DEPTHS, CARD):
        remove_partial(output / name)
    if path.exists():
        if OmegaConf.to_container(OmegaConf.load(path)) != wanted:
            raise ConfigError(
                f"output {str(output)!r} holds a training with other settings: choose another"
                " folder, or remove it"
            )
        return
    if any(place.name != LOCK for place in output.iterdir()):
        raise ConfigError(
            f"output {str(output)!r} is not empty and holds no training: choose another folder"
        )
    write_text(path, OmegaConf.to_yaml(wanted))


def _tokenizer(settings: TrainSettings, texts: list[str], output: Path) -> Tokenizer:
    try:
        if settings.tokenizer != "bpe":
            return load_tokenizer(settings.tokenizer)
        path = output / TOKENIZER
        if not path.exists():
            size = settings.architecture.vocab_size
            trained = train_bpe(texts, vocab_size=size, name=output.name)
            write_atomically(path, lambda partial: save_tokenizer(trained, partial))
        return load_tokenizer(path)
    except TokenizerError as error:
        raise ConfigError(f"tokenizer: {error}") from None
    except ImportError:
        raise ConfigError(
            "tokenizer=bpe needs rustbpe: pip install 'stateful_gpt[train]'"
        ) from None


def _open_tracker(settings: TrainSettings, output: Path) -> Tracker:
    shutil.rmtree(output / "wandb", ignore_errors=True)  # its history is logged again, from ours
    return Tracker(
        settings.tracking,
        # two trainings of one name are two runs; one that is resumed stays the same
        run_id=short_hash([str(output.resolve()), deciding(settings)]),
        name=output.name,
        group="train",
        tags=["train"],
        config=settings.plain(),
        folder=output,
        axis="step",
        measures=MEASURES,
        warn=warn,
        later=f"wandb sync {shlex.quote(str(output))}/wandb/*run-*",
    )
