"""Train a GPT on a folder of text: tokenizer, model, held-out loss, a model folder with its card.

    python -m experiments.train                        # the recipe of the bundled model
    python -m experiments.train training.steps=100 output=runs/models/short

Killed at any moment, the same command carries on from the last saved state.
"""

import pickle
import shlex
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import hydra
import tiktoken
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from experiments.command import CONF, RunError, run_command, saying_why
from experiments.config import ConfigError, TrainSettings, register_schemas, to_settings
from experiments.files import remove_partial, write_atomically, write_json
from experiments.provenance import provenance
from experiments.tracking import Tracker
from stateful_gpt.attention import Attention
from stateful_gpt.checkpoint import load_checkpoint, save_checkpoint
from stateful_gpt.device import choose_device
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.tokenizer import (
    TokenizerError,
    end_token,
    load_tokenizer,
    save_bpe,
    train_bpe,
)
from stateful_gpt.train import (
    TrainingConfig,
    batch_at,
    make_optimizers,
    total_nats,
    training_step,
)

STATE = "training_state.pt"
HISTORY = "history.json"
CONFIG = "training.yaml"
TOKENIZER = "tokenizer.json"
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
    output = Path(settings.output)
    _claim(output, settings)
    if (output / CARD).exists():
        print(f"{output} is trained already: nothing to do")
        return output
    encoding = _tokenizer(settings, texts, output)
    if encoding.n_vocab > architecture.vocab_size:
        raise ConfigError(
            f"architecture.vocab_size must be at least the tokenizer's {encoding.n_vocab} ids,"
            f" got {architecture.vocab_size}"
        )
    tokens = encode_corpus(texts, encoding)
    held_out = encode_corpus(held_out_texts, encoding)
    if len(tokens) <= architecture.block_size:
        raise ConfigError(
            f"corpus.train has {len(tokens)} tokens, fewer than one window of"
            f" architecture.block_size={architecture.block_size}"
        )
    tracker = _open_tracker(settings, output)
    try:
        training = _Training(settings, architecture, device, tokens, output)
        characters = sum(len(text) for text in held_out_texts)
        training.run(held_out, characters, tracker)
        save_checkpoint(
            training.model,
            output,
            tokenizer=settings.tokenizer if settings.tokenizer in ("gpt2", "byte") else encoding,
            dtype=torch.float16,
        )
        # the loss that counts is that of the rounded weights in the file
        saved = load_checkpoint(output, device=device).model
        loss = total_nats(saved, held_out) / characters
        card = _card(settings, training, loss, tokens=len(tokens), device=device)
        write_atomically(output / CARD, lambda path: path.write_text(card, encoding="utf-8"))
        tracker.summarize({"held_out_nats_per_character": loss})
    except OSError as error:
        raise RunError(
            f"output: {str(error.filename or output)!r} cannot be written"
            f" ({error.strerror or error})"
        ) from None
    finally:
        tracker.finish()
    print(f"{output}: held out {loss:.4f} nats per character")
    return output


def read_texts(key: str, folder: str) -> list[str]:
    """The .txt files of a folder in the order of their names.

    Raises:
        ConfigError: there are none, or one is not text.
    """
    paths = sorted(Path(folder).glob("*.txt"))
    if not paths:
        raise ConfigError(
            f"{key} must be a folder of .txt files, got {folder!r}"
            " (python -m scripts.prepare_corpus makes data/austen)"
        )
    try:
        return [path.read_text(encoding="utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: a file of {folder!r} is not readable text ({error})") from None


def encode_corpus(texts: list[str], encoding: tiktoken.Encoding) -> Tensor:
    """(N,) ids of all texts, each begun by the end-of-text token."""
    end = end_token(encoding)
    ids: list[int] = []
    for text in texts:
        if end is not None:
            ids.append(end)
        ids.extend(encoding.encode_ordinary(text))
    return torch.tensor(ids)


class _Training:
    """Model, optimizers and history of one training, and where they are kept."""

    def __init__(
        self,
        settings: TrainSettings,
        architecture: GPTConfig,
        device: torch.device,
        tokens: Tensor,
        output: Path,
    ) -> None:
        self.settings = settings
        self.output = output
        self.tokens = tokens
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
        )
        torch.manual_seed(settings.seed)  # dropout draws from the global generator
        self.model = GPT(architecture)
        self.model.initialize(generator=torch.Generator().manual_seed(settings.seed))
        self.model.use_attention(Attention(chosen.attention))
        self.model.to(device)
        self.optimizers = make_optimizers(self.model, self.config)
        self.step = 0
        self.seconds = 0.0
        self.loss: float | None = None  # smoothed
        self.history: list[dict[str, float]] = []
        self._resume(device)

    def run(self, held_out: Tensor, characters: int, tracker: Tracker) -> None:
        for row in self.history:
            tracker.log(row)
        device = self.model.lm_head.weight.device
        saved_at = time.monotonic()
        started = saved_at - self.seconds
        chosen = self.settings.training
        with tqdm(total=self.config.steps, initial=self.step, unit="step", disable=None) as bar:
            while self.step < self.config.steps:
                windows = batch_at(
                    self.step,
                    self.tokens,
                    size=self.config.batch_size,
                    length=self.model.config.block_size,
                    seed=self.settings.seed,
                )
                loss = training_step(
                    self.model,
                    self.optimizers,
                    windows.to(device),
                    step=self.step,
                    config=self.config,
                )
                self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
                self.step += 1
                bar.update()
                self.seconds = time.monotonic() - started
                if self.step % chosen.evaluate_every == 0 or self.step == self.config.steps:
                    row = self._evaluate(held_out, characters)
                    self.history.append(row)
                    tracker.log(row)
                if time.monotonic() - saved_at >= chosen.save_every_seconds:
                    self._save()
                    saved_at = time.monotonic()
        self._save()

    def _evaluate(self, held_out: Tensor, characters: int) -> dict[str, float]:
        nats = total_nats(self.model, held_out)
        assert self.loss is not None
        tqdm.write(
            f"step {self.step:6d}  {self.seconds:6.0f} s  train {self.loss:.3f} nats/token"
            f"  held out {nats / characters:.4f} nats/character",
            file=sys.stdout,
        )
        sys.stdout.flush()
        return {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "train_loss": self.loss,
            "held_out_loss": nats / (len(held_out) - 1),
            "held_out_nats_per_character": nats / characters,
        }

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
            "history": self.history,
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
        self.loss, self.history = state["loss"], state["history"]


def _claim(output: Path, settings: TrainSettings) -> None:
    """Make the output folder ours, or find that it holds this very training."""
    wanted = {key: value for key, value in asdict(settings).items() if key not in _FREE}
    path = output / CONFIG
    for name in (CONFIG, TOKENIZER, STATE, HISTORY, CARD):
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
        measures=("train_loss", "held_out_loss", "held_out_nats_per_character"),
        warn=lambda message: tqdm.write(f"warning: {message}", file=sys.stderr),
        later=f"wandb sync {shlex.quote(str(output))}/wandb/*run-*",
    )


def _card(
    settings: TrainSettings,
    training: _Training,
    loss: float,
    *,
    tokens: int,
    device: torch.device,
) -> str:
    """The model card: what it was trained on, how, and how well it predicts."""
    origin = provenance(device)
    config = training.model.config
    held_out = ", ".join(path.stem for path in sorted(Path(settings.corpus.held_out).glob("*.txt")))
    trained_on = ", ".join(path.stem for path in sorted(Path(settings.corpus.train).glob("*.txt")))
    command = shlex.join(["python", "-m", "experiments.train", *sys.argv[1:]])
    shape = f"{config.n_layer} layers × {config.n_embd}, {config.n_head} heads"
    return f"""# {Path(settings.output).name}

A GPT of nanoGPT's architecture, trained from scratch by this project. Its weights are stored in
float16.

| | |
|---|---|
| size | {training.model.count_parameters():,} parameters: {shape} |
| reads | {config.block_size} tokens at a time, {config.vocab_size:,} ids ({settings.tokenizer}) |
| trained on | {trained_on} ({tokens:,} tokens) |
| held out | {held_out}: **{loss:.4f} nats per character** |
| measured by | `python -m scripts.held_out_loss` (windows that do not overlap) |
| recipe | `{command}` |
| seed | {settings.seed} |
| steps | {training.step:,} of {settings.training.batch_size} × {config.block_size} tokens |
| hardware | {origin["device"]} |
| time | {training.seconds / 60:.0f} minutes |
| commit | {origin["commit"]} |
| PyTorch | {origin["versions"]["torch"]} |
"""


@hydra.main(config_path=CONF, config_name="train", version_base="1.3")
def _job(config: DictConfig) -> None:
    with saying_why():
        train(to_settings(config, TrainSettings))


def main() -> int:
    register_schemas()
    return run_command(_job, after=lambda config: None)


if __name__ == "__main__":
    sys.exit(main())
