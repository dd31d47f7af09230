"""Train a GPT on a folder of text: tokenizer, model, held-out loss, a checkpoint that resumes.

    python -m experiments.train                        # the recipe of the bundled model
    python -m experiments.train training.steps=100 output=runs/models/short

Killed at any moment, the same command carries on from the last saved state.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.config import TrainSettings
from experiments.files import read_json, write_atomically, write_json
from stateful_gpt.attention import Attention
from stateful_gpt.checkpoint import save_checkpoint
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.tokenizer import end_token, load_tokenizer, save_bpe, train_bpe
from stateful_gpt.train import (
    TrainingConfig,
    batch_at,
    make_optimizers,
    total_nats,
    training_step,
)

STATE = "training_state.pt"


def read_texts(folder: Path) -> list[str]:
    """The .txt files of a folder in the order of their names."""
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]


def encode_corpus(texts: list[str], encoding: tiktoken.Encoding) -> Tensor:
    """(N,) ids of all texts, each begun by the end-of-text token."""
    end = end_token(encoding)
    assert end is not None
    ids: list[int] = []
    for text in texts:
        ids.append(end)
        ids.extend(encoding.encode_ordinary(text))
    return torch.tensor(ids)


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train as configured and leave a model folder; returns its summary."""
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    texts = read_texts(Path(settings.corpus.train))
    held_out_texts = read_texts(Path(settings.corpus.held_out))
    tokenizer_file = output / "tokenizer.json"
    if settings.tokenizer != "bpe":
        encoding = load_tokenizer(settings.tokenizer)
    elif tokenizer_file.exists():
        encoding = load_tokenizer(tokenizer_file)
    else:
        encoding = train_bpe(texts, vocab_size=settings.architecture.vocab_size, name=output.name)
        write_atomically(tokenizer_file, lambda path: save_bpe(encoding, path))
    tokens = encode_corpus(texts, encoding)
    held_out = encode_corpus(held_out_texts, encoding)
    characters = sum(len(text) for text in held_out_texts)

    config = TrainingConfig(
        steps=settings.training.steps,
        batch_size=settings.training.batch_size,
        learning_rate=settings.training.learning_rate,
        matrix_learning_rate=settings.training.matrix_learning_rate,
        final_fraction=settings.training.final_fraction,
        warmup_steps=settings.training.warmup_steps,
        weight_decay=settings.training.weight_decay,
        grad_clip=settings.training.grad_clip,
        autocast=settings.training.precision == "bfloat16",
        attention=Attention(settings.training.attention),
        passes=settings.training.passes,
    )
    torch.manual_seed(settings.seed)  # dropout draws from the global generator
    model = GPT(GPTConfig(**asdict(settings.architecture)))
    model.initialize(generator=torch.Generator().manual_seed(settings.seed))
    model.use_attention(config.attention)
    optimizers = make_optimizers(model, config)

    first_step, seconds_before, history = 0, 0.0, []
    state_file = output / STATE
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        torch.set_rng_state(state["rng"])
        first_step, seconds_before = state["step"], state["seconds"]
        history = [r for r in read_json(output / "history.json") if r["step"] <= first_step]

    started = last_saved = time.monotonic()

    def seconds() -> float:
        return seconds_before + time.monotonic() - started

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "rng": torch.get_rng_state(),
            "step": step,
            "seconds": seconds(),
        }
        write_json(output / "history.json", history)
        write_atomically(state_file, lambda path: torch.save(state, path))

    def evaluate(step: int, loss: float) -> None:
        nats = total_nats(model, held_out)
        history.append(
            {
                "step": step,
                "seconds": round(seconds(), 1),
                "train_loss": loss,
                "held_out_loss": nats / (len(held_out) - 1),
                "held_out_nats_per_character": nats / characters,
            }
        )
        tqdm.write(
            f"step {step:5d}  {seconds():6.0f} s  train {loss:.3f} nats/token"
            f"  held out {nats / characters:.4f} nats/character",
            file=sys.stdout,
        )

    smooth = history[-1]["train_loss"] if history else None
    for step in tqdm(
        range(first_step, config.steps), initial=first_step, total=config.steps, disable=None
    ):
        windows = batch_at(
            step,
            tokens,
            size=config.batch_size,
            length=model.config.block_size,
            seed=settings.seed,
        )
        loss = training_step(model, optimizers, windows, step=step, config=config)
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        done = step + 1
        if done % settings.training.evaluate_every == 0 or done == config.steps:
            evaluate(done, smooth)
        if time.monotonic() - last_saved > settings.training.save_every_seconds:
            save(done)
            last_saved = time.monotonic()
    save(config.steps)
    save_checkpoint(model, output, tokenizer=encoding, dtype=torch.float16)
    return history[-1] | {"parameters": model.count_parameters(), "tokens": len(tokens)}


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(train(TrainSettings()))
