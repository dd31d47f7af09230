"""The card of a trained model: what it was trained on, how, and how well it predicts."""

import shlex
import sys
from pathlib import Path
from typing import Any

from experiments.runs.provenance import provenance
from experiments.train.loop import Training
from experiments.train.settings import TrainSettings


def model_card(
    settings: TrainSettings, training: Training, *, nats: str, nats_full: str | None
) -> str:
    """The text of a model folder's README.md.

    Args:
        nats: held-out loss per character, of one pass.
        nats_full: the same with hidden states fed back at generation's depth.
    """
    model, config, chosen = training.model, training.model.config, settings.training
    origin = provenance(model.device)
    shape = f"{config.n_layer} layers × {config.n_embd}, {config.n_head} heads"
    start = "from scratch" if settings.start_from is None else f"from `{settings.start_from}`"
    loss = f"**{nats} nats per character**"
    if nats_full is not None:
        loss += f" in one pass, **{nats_full}** with hidden states fed back"
    rows: list[tuple[str, Any]] = [
        ("size", f"{model.count_parameters():,} parameters: {shape}"),
        (
            "reads",
            f"{config.block_size} tokens at a time, {config.vocab_size:,} ids"
            f" ({settings.tokenizer if settings.start_from is None else 'as it started'})",
        ),
        ("trained on", f"{_names(settings.corpus.train)} ({training.corpus.size:,} tokens)"),
        ("held out", f"{_names(settings.corpus.held_out)}: {loss}"),
        ("measured by", _measured_by(settings)),
        ("recipe", f"`{shlex.join(['python', '-m', 'experiments.train', *sys.argv[1:]])}`"),
        ("seed", settings.seed),
        ("steps", f"{training.step:,} of {chosen.batch_size} × {config.block_size} tokens"),
        ("hardware", origin["device"]),
        ("time", f"{training.seconds / 60:.0f} minutes"),
        ("commit", origin["commit"]),
        ("PyTorch", origin["versions"]["torch"]),
    ]
    if chosen.passes > 1:
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
