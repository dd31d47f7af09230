"""Train a GPT on a folder of text: tokenizer, model, held-out loss, a model folder with its card.

    python -m experiments.train                        # the recipe of the bundled model
    python -m experiments.train training.steps=100 output=runs/models/short

Killed at any moment, the same command carries on from the last saved state.
"""

import json
import pickle
import shlex
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hydra
import tiktoken
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from experiments.command import CONF, RunError, run_command, saying_why
from experiments.config import ConfigError, TrainSettings, register_schemas, to_settings
from experiments.corpus import Corpus, documents, read_texts, stream
from experiments.files import remove_partial, write_atomically, write_json
from experiments.model_card import model_card
from experiments.tracking import Tracker
from stateful_gpt.attention import Attention
from stateful_gpt.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from stateful_gpt.depth import DepthProfile, depth_profile
from stateful_gpt.device import choose_device
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.tokenizer import (
    TokenizerError,
    load_tokenizer,
    save_bpe,
    train_bpe,
)
from stateful_gpt.train import (
    TrainingConfig,
    make_optimizers,
    passes_at,
    training_step,
)

STATE = "training_state.pt"
HISTORY = "history.json"
CONFIG = "training.yaml"
TOKENIZER = "tokenizer.json"
DEPTHS = "depths.json"
CARD = "README.md"

# settings that say where and how fast, not what is trained
_FREE = ("output", "device", "tracking")


def train(settings: TrainSettings) -> Path:
    """Train as configured unless that is done; returns the model folder.

    Raises:
        ConfigError: settings that cannot be, or an output folder that holds another training.
    """
    settings.check()
    try:
        device = choose_device(settings.device.name)
        architecture = GPTConfig(**asdict(settings.architecture))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    texts = read_texts("corpus.train", settings.corpus.train)
    held_out_texts = read_texts("corpus.held_out", settings.corpus.held_out)
    origin = _starting_point(settings, architecture)
    output = Path(settings.output)
    _claim(output, settings)
    if (output / CARD).exists():
        print(f"{output} is trained already: nothing to do")
        return output
    encoding = origin.tokenizer if origin is not None else _tokenizer(settings, texts, output)
    if encoding.n_vocab > architecture.vocab_size:
        raise ConfigError(
            f"architecture.vocab_size must be at least the tokenizer's {encoding.n_vocab} ids,"
            f" got {architecture.vocab_size}"
        )
    corpus = _corpus("corpus.train", texts, encoding, settings)
    held_out = _corpus("corpus.held_out", held_out_texts, encoding, settings)
    tracker = _open_tracker(settings, output)
    try:
        training = _Training(settings, architecture, origin, device, corpus, output)
        training.run(held_out, tracker)
        save_checkpoint(
            training.model,
            output,
            tokenizer=encoding.name if encoding.name in ("gpt2", "byte") else encoding,
            dtype=torch.float16,
            trained_passes=settings.training.passes if architecture.hidden_feedback else None,
        )
        # the loss that counts is that of the rounded weights in the file
        saved = load_checkpoint(output, device=device).model
        profile = training.profile(
            saved,
            held_out,
            full=architecture.hidden_feedback,
            windows=settings.training.final_windows,
        )
        write_json(output / DEPTHS, _depths(profile, held_out, settings))
        length = held_out.characters_per_prediction
        loss = profile.nll[0] / length
        loss_full = None if profile.nll_full is None else profile.nll_full / length
        card = model_card(
            settings,
            training.model,
            tokens=corpus.size,
            steps=training.step,
            seconds=training.seconds,
            nats_per_character=loss,
            nats_per_character_full=loss_full,
        )
        write_atomically(output / CARD, lambda path: path.write_text(card, encoding="utf-8"))
        tracker.summarize({"held_out_nats_per_character": loss})
    except OSError as error:
        raise RunError(
            f"output: {str(error.filename or output)!r} cannot be written"
            f" ({error.strerror or error})"
        ) from None
    finally:
        tracker.finish()
    fed_back = "" if loss_full is None else f", {loss_full:.4f} with hidden states fed back"
    print(f"{output}: held out {loss:.4f} nats per character{fed_back}")
    return output


def _starting_point(settings: TrainSettings, architecture: GPTConfig) -> Checkpoint | None:
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


def _corpus(
    key: str, texts: list[str], encoding: tiktoken.Encoding, settings: TrainSettings
) -> Corpus:
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


def _depths(profile: DepthProfile, held_out: Corpus, settings: TrainSettings) -> dict[str, Any]:
    """The content of depths.json, losses in nats per token."""
    return {
        "trained_passes": settings.training.passes,
        "nll": profile.nll,
        "kl": profile.kl,
        "nll_full": profile.nll_full,
        "contracts": profile.broken_at is None,
        "broken_at": profile.broken_at,
        "tokens": profile.tokens,
        "characters_per_token": held_out.characters_per_prediction,
    }


class _Training:
    """Model, optimizers and history of one training, and where they are kept."""

    def __init__(
        self,
        settings: TrainSettings,
        architecture: GPTConfig,
        origin: Checkpoint | None,
        device: torch.device,
        corpus: Corpus,
        output: Path,
    ) -> None:
        self.settings = settings
        self.output = output
        self.corpus = corpus
        chosen = settings.training
        self.config = TrainingConfig(
            steps=chosen.steps,
            batch_size=chosen.batch_size,
            learning_rate=chosen.learning_rate,
            matrix_learning_rate=chosen.matrix_learning_rate,
            final_fraction=chosen.final_fraction,
            warmup_steps=chosen.warmup_steps,
            weight_decay=chosen.weight_decay,
            grad_clip=chosen.grad_clip,
            autocast=chosen.precision == "bfloat16",
            passes=chosen.passes,
            draw_passes=chosen.draw_passes,
            through_passes=chosen.through_passes,
            update_every_pass=chosen.update_every_pass,
        )
        torch.manual_seed(settings.seed)  # dropout draws from the global generator
        generator = torch.Generator().manual_seed(settings.seed)
        if origin is None:
            self.model = GPT(architecture)
            self.model.initialize(generator=generator)
        else:
            self.model = _with_dropout(origin.model, architecture, generator)
        self.model.use_attention(Attention(chosen.attention))
        self.model.to(device)
        self.optimizers = make_optimizers(self.model, self.config)
        self.step = 0
        self.seconds = 0.0
        self.tokens_read = 0  # in all passes: what training has cost, up to a factor
        self.loss: float | None = None  # smoothed
        self.history: list[dict[str, Any]] = []
        self._resume(device)

    def run(self, held_out: Corpus, tracker: Tracker) -> None:
        for row in self.history:
            tracker.log(_flat(row))
        device = self.model.lm_head.weight.device
        saved_at = time.monotonic()
        started = saved_at - self.seconds
        chosen, seed = self.settings.training, self.settings.seed
        with tqdm(total=self.config.steps, initial=self.step, unit="step", disable=None) as bar:
            while self.step < self.config.steps:
                windows = self.corpus.batch(self.step, size=self.config.batch_size, seed=seed)
                losses = training_step(
                    self.model,
                    self.optimizers,
                    windows.to(device),
                    step=self.step,
                    config=self.config,
                    passes=passes_at(self.step, self.config, seed=seed),
                )
                loss = losses[0]
                self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
                self.tokens_read += windows[:, 1:].numel() * len(losses)
                self.step += 1
                bar.update()
                self.seconds = time.monotonic() - started
                if self.step % chosen.evaluate_every == 0 or self.step == self.config.steps:
                    row = self._evaluate(held_out)
                    self.history.append(row)
                    tracker.log(_flat(row))
                if time.monotonic() - saved_at >= chosen.save_every_seconds:
                    self._save()
                    saved_at = time.monotonic()
        self._save()

    def profile(
        self, model: GPT, held_out: Corpus, *, full: bool, windows: int | None = None
    ) -> DepthProfile:
        """Held-out loss and movement by depth, of some windows spread over the text, or of all."""
        table = held_out.windows()
        if windows is not None and windows < len(table):
            table = table[torch.linspace(0, len(table) - 1, windows).long()]
        depth = self.settings.training.evaluate_depth if model.gate is not None else 0
        return depth_profile(model, table, depth=depth, full=full)

    def _evaluate(self, held_out: Corpus) -> dict[str, Any]:
        assert self.loss is not None
        # depths cost a pass each: of a model with a gate, a part of the text has to do
        windows = self.settings.training.evaluate_windows if self.model.gate is not None else None
        profile = self.profile(self.model, held_out, full=False, windows=windows)
        nats = profile.nll[0] * profile.tokens
        row: dict[str, Any] = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "tokens_read": self.tokens_read,
            "train_loss": self.loss,
            "held_out_loss": profile.nll[0],
        }
        if windows is None:
            row["held_out_nats_per_character"] = nats / held_out.characters
        said = f"held out {profile.nll[0]:.4f} nats/token"
        if profile.kl:
            row["nll_by_depth"] = profile.nll
            row["kl_by_depth"] = profile.kl
            row["contracts"] = profile.broken_at is None
            said += f", {profile.nll[1]:.4f} at depth 1, {profile.nll[-1]:.4f} at {len(profile.kl)}"
            said += (
                "; KL falls with every pass"
                if profile.broken_at is None
                else f"; KL does not fall at depth {profile.broken_at}"
            )
        tqdm.write(
            f"step {self.step:6d}  {self.seconds:6.0f} s  train {self.loss:.3f}  {said}",
            file=sys.stdout,
        )
        sys.stdout.flush()
        return row

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "step": self.step,
            "seconds": self.seconds,
            "tokens_read": self.tokens_read,
            "loss": self.loss,
            "history": json.dumps(self.history),
        }
        write_atomically(self.output / STATE, lambda path: torch.save(state, path))
        write_json(self.output / HISTORY, self.history)

    def _resume(self, device: torch.device) -> None:
        path = self.output / STATE
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ConfigError(f"output: {str(path)!r} is damaged, remove it ({error})") from None
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
        self.tokens_read, self.loss = state["tokens_read"], state["loss"]
        self.history = json.loads(state["history"])


def _with_dropout(model: GPT, architecture: GPTConfig, generator: torch.Generator) -> GPT:
    """The model that training starts from, with the dropout and the gate that are asked for."""
    if architecture.hidden_feedback and model.gate is None:
        model = model.with_gate(generator=generator)
    copy = GPT(replace(model.config, dropout=architecture.dropout), tied=model.tied)
    copy.load_state_dict(model.state_dict())
    return copy


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for the tracker: a list becomes one metric for each depth."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list):
            flat |= {f"{key}/{n}": number for n, number in enumerate(value)}
        else:
            flat[key] = value
    return flat


def _claim(output: Path, settings: TrainSettings) -> None:
    """Make the output folder ours, or find that it holds this very training."""
    wanted = {key: value for key, value in asdict(settings).items() if key not in _FREE}
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
    try:
        if output.exists() and any(output.iterdir()):
            raise ConfigError(
                f"output {str(output)!r} is not empty and holds no training: choose another folder"
            )
        content = OmegaConf.to_yaml(OmegaConf.create(wanted))
        write_atomically(path, lambda partial: partial.write_text(content, encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"output {str(output)!r} cannot be written ({error.strerror or error})"
        ) from None


def _tokenizer(settings: TrainSettings, texts: list[str], output: Path) -> tiktoken.Encoding:
    try:
        if settings.tokenizer != "bpe":
            return load_tokenizer(settings.tokenizer)
        path = output / TOKENIZER
        if not path.exists():
            trained = train_bpe(
                texts, vocab_size=settings.architecture.vocab_size, name=output.name
            )
            write_atomically(path, lambda partial: save_bpe(trained, partial))
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
        run_id=output.name,
        name=output.name,
        group="train",
        tags=["train"],
        config=asdict(settings),
        folder=output,
        axis="step",
        measures=_measures(settings),
        warn=lambda message: tqdm.write(f"warning: {message}", file=sys.stderr),
        later=f"wandb sync {shlex.quote(str(output))}/wandb/*run-*",
    )


def _measures(settings: TrainSettings) -> tuple[str, ...]:
    names = ["train_loss", "held_out_loss", "held_out_nats_per_character", "tokens_read"]
    if settings.architecture.hidden_feedback:
        depth = settings.training.evaluate_depth
        names += [f"nll_by_depth/{n}" for n in range(depth + 1)]
        names += [f"kl_by_depth/{n}" for n in range(depth)]
    return tuple(names)


@hydra.main(config_path=CONF, config_name="train", version_base="1.3")
def _job(config: DictConfig) -> None:
    with saying_why():
        train(to_settings(config, TrainSettings))


def main() -> int:
    register_schemas()
    return run_command(_job, after=lambda config: None)


if __name__ == "__main__":
    sys.exit(main())
