"""The card of a trained model: what it was trained on, how, and how well it predicts."""

import shlex
import sys
from pathlib import Path
from typing import Any

from experiments.runs.provenance import provenance
from experiments.train.settings import TrainSettings
from stateful_gpt.model import GPT


def model_card(
    settings: TrainSettings,
    model: GPT,
    *,
    tokens: int,
    steps: int,
    seconds: float,
    nats_per_character: float,
    nats_per_character_full: float | None,
) -> str:
    """The text of a model folder's README.md.

    Args:
        tokens: of the training corpus.
        nats_per_character: held-out loss, of one pass.
        nats_per_character_full: the same with hidden states fed back at generation's depth.
    """
    origin = provenance(model.lm_head.weight.device)
    config, training = model.config, settings.training
    shape = f"{config.n_layer} layers × {config.n_embd}, {config.n_head} heads"
    start = "from scratch" if settings.start_from is None else f"from `{settings.start_from}`"
    loss = f"**{nats_per_character:.4f} nats per character**"
    if nats_per_character_full is not None:
        loss += f" in one pass, **{nats_per_character_full:.4f}** with hidden states fed back"
    rows: list[tuple[str, Any]] = [
        ("size", f"{model.count_parameters():,} parameters: {shape}"),
        (
            "reads",
            f"{config.block_size} tokens at a time, {config.vocab_size:,} ids"
            f" ({settings.tokenizer if settings.start_from is None else 'as it started'})",
        ),
        ("trained on", f"{_names(settings.corpus.train)} ({tokens:,} tokens)"),
        ("held out", f"{_names(settings.corpus.held_out)}: {loss}"),
        (
            "measured by",
            _measured_by(settings),
        ),
        ("recipe", f"`{shlex.join(['python', '-m', 'experiments.train', *sys.argv[1:]])}`"),
        ("seed", settings.seed),
        ("steps", f"{steps:,} of {training.batch_size} × {config.block_size} tokens"),
        ("hardware", origin["device"]),
        ("time", f"{seconds / 60:.0f} minutes"),
        ("commit", origin["commit"]),
        ("PyTorch", origin["versions"]["torch"]),
    ]
    if training.passes > 1:
        rows.insert(-4, ("passes", _passes(settings)))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""# {Path(settings.output).name}

A GPT of nanoGPT's architecture, trained {start} by this project. Its weights are stored in
float16.

| | |
|---|---|
{table}
"""


def _measured_by(settings: TrainSettings) -> str:
    words = "python -m scripts.held_out_loss --model THIS_FOLDER"
    if settings.corpus.documents == "file":
        return f"`{words}` (windows that do not overlap)"
    texts = shlex.quote(settings.corpus.held_out)
    return f"`{words} --texts {texts} --documents line` (a line at a time, its end predicted too)"


def _passes(settings: TrainSettings) -> str:
    training = settings.training
    words = [f"up to {training.passes} drawn" if training.draw_passes else str(training.passes)]
    words.append("back-propagated through" if training.through_passes else "detached")
    if training.update_every_pass:
        words.append("an update after each")
    return ", ".join(words)


def _names(folder: str) -> str:
    return ", ".join(path.stem for path in sorted(Path(folder).glob("*.txt")))
