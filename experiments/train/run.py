"""Train one model, into its folder: weights, tokenizer, losses by depth, and a card."""

import hashlib
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from experiments.runs import files
from experiments.runs.compute_once import ALONE, Asked, RunError, disk_sentence
from experiments.runs.folder import TRACKER, origin_of_part, read_config, unlike
from experiments.runs.lock import LOCK, locked
from experiments.runs.provenance import provenance
from experiments.settings import ConfigError
from experiments.tracking.tracker import Tracker, warn
from experiments.train.corpus import read_corpus, read_texts
from experiments.train.loop import HISTORY, STATE, Training
from experiments.train.settings import TrainSettings
from stateful_gpt.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from stateful_gpt.console import cut, exhausted, printable
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.tokenizer import (
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    train_bpe,
)
from stateful_gpt.untrusted import require_memory

CONFIG = "training.yaml"
TOKENIZER = "tokenizer.json"
MODEL = ("config.json", TOKENIZER, "model.safetensors")
DEPTHS = "depths.json"
CARD = "README.md"
MEASURES = ("train_loss", "held_out_*", "tokens_read", "nll_by_depth/*", "kl_by_depth/*")


def train(settings: TrainSettings, asked: Asked = ALONE) -> Path:
    """Train as configured unless that is done; returns the model folder.

    Raises:
        ConfigError: settings that cannot be, or an output folder that holds another training.
        RunError: a file cannot be written.
    """
    device = settings.device.found()
    try:
        architecture = GPTConfig(**settings.architecture.plain())
        # at the least, in float32: weights, their gradients, and two moments of each
        needed = 16 * (12 * architecture.n_layer * architecture.n_embd + architecture.vocab_size)
        require_memory(needed * architecture.n_embd, "n_layer and architecture.n_embd ask for")
    except ValueError as error:
        raise ConfigError(f"architecture.{error}") from None
    texts = [read_texts(f"corpus.{k}", getattr(settings.corpus, k)) for k in ("train", "held_out")]
    origin = _starting_point(settings, architecture)
    digests = [[hashlib.sha256(t.encode()).hexdigest() for t in each.values()] for each in texts]
    if origin is not None:
        start = (tensor.contiguous().numpy() for tensor in origin.model.state_dict().values())
        digests.append([hashlib.sha256(weights.data).hexdigest() for weights in start])
    sources = files.short_hash(digests)
    output = Path(settings.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(disk_sentence(error, output, key="output")) from None
    try:
        if _lack(output, settings) is not None:
            with locked(output):
                _take(output, settings)
                if (lack := _lack(output, settings)) is not None:
                    if (output / CARD).exists():
                        warn(f"{output} is damaged ({lack}) and is trained again")
                    _train(settings, architecture, device, origin, texts, sources, asked)
                    return output
        depths, known = files.read_json(output / DEPTHS), load_checkpoint(output).tokenizer
        now: Tokenizer = known  # of the same texts, bpe makes the same
        if origin is not None or settings.tokenizer != "bpe":
            now = origin.tokenizer if origin else _tokenizer(settings, ())
        words = [[token_bytes(e, i) for i in range(e.n_vocab)] for e in (now, known)]
        # early versions did not say their sources
        if words[0] != words[1] or depths.get("sources", sources) != sources:
            raise ConfigError(
                f"output {cut(repr(str(output)))} holds a training of other texts, tokenizer or"
                " starting weights: choose another folder, or remove it"
            )
        print(f"{output} is trained already: nothing to do")
    except (MemoryError, OSError, RuntimeError) as error:
        if (whose := exhausted(error)) is not None:
            raise RunError(
                f"{whose} does not hold the training: use a smaller training.batch_size or"
                " architecture.block_size"
            ) from None
        if not isinstance(error, OSError):
            raise
        raise RunError(disk_sentence(error, output, key="output")) from None
    return output


def _train(
    settings: TrainSettings,
    architecture: GPTConfig,
    device: torch.device,
    origin: Checkpoint[GPT] | None,
    texts: list[dict[str, str]],
    sources: str,
    asked: Asked,
) -> None:
    output, stateful = Path(settings.output), architecture.hidden_feedback
    about = origin_of_part(provenance(device))  # a source edited while it trains is not what runs
    encoding: Any = origin.tokenizer if origin else _tokenizer(settings, texts[0].values())
    if encoding.n_vocab > architecture.vocab_size:
        raise ConfigError(
            f"architecture.vocab_size must be at least the tokenizer's {encoding.n_vocab} ids,"
            f" got {architecture.vocab_size}"
        )
    lines, block = settings.corpus.documents == "line", architecture.block_size
    corpora = []
    for key, each in zip(("corpus.train", "corpus.held_out"), texts, strict=True):
        try:
            corpus = read_corpus(key, each.values(), encoding, block_size=block, lines=lines)
        except TokenizerError as error:
            raise ConfigError(f"{key}: {error}") from None
        if not lines and corpus.size <= block:
            raise ConfigError(
                f"{key} has {corpus.size} tokens, too few for one window of"
                f" architecture.block_size={block} and the token behind it"
            )
        corpora.append(corpus)
    train, held_out = corpora
    tracker = _open_tracker(settings, output, sources)
    try:
        torch.manual_seed(settings.seed)  # dropout draws from the global generator
        model = _model(origin, architecture, seed=settings.seed).to(device)
        training = Training(settings, model, train, held_out, output)
        if others := [other for other in training.origins if other != about]:
            said = f"of its first {training.step} steps, an earlier attempt computed some"
            warn(f"{output}: {said} with {unlike(about, others)}; its {CARD} will say which")
        training.origins += [] if about in training.origins else [about]  # as they came
        training.run(tracker)
        save_checkpoint(
            model,
            output,
            tokenizer=encoding,
            dtype=torch.float16,
            trained_passes=settings.training.passes if stateful else None,
        )
        # the loss that counts is that of the rounded weights in the file
        rounded = load_checkpoint(output, device=device).model
        depth = settings.training.evaluate_depth if stateful else 0
        windows = settings.training.final_windows
        profile = training.profile(rounded, depth=depth, full=stateful, windows=windows)
        length = held_out.characters_per_prediction
        depths = {  # losses in nats per token
            **asdict(profile),
            "trained_passes": settings.training.passes,
            "contracts": profile.broken_at is None,
            "broken_at": profile.broken_at,
            "characters_per_token": length,
            "sources": sources,  # a hash of texts and starting weights
            "checksums": files.checksums(output, (CONFIG, HISTORY, *MODEL)),
        }
        files.write_json(output / DEPTHS, depths)
        loss = f"**{profile.nll[0] / length:.4f} nats per character**"
        if profile.nll_full is not None:
            loss += f" in one pass, **{profile.nll_full / length:.4f}** with hidden states fed back"
        if windows is not None and windows < len(held_out.windows()):
            loss += f" (on {windows} windows spread over it)"
        files.write_text(output / CARD, _card(training, texts, asked, loss))
        tracker.summarize({"held_out_nats_per_character": profile.nll[0] / length})
    except BaseException:
        tracker.finish(failed=True)
        raise
    tracker.finish()
    print(f"{output}: held out {loss.replace('**', '')}")


def _starting_point(settings: TrainSettings, architecture: GPTConfig) -> Checkpoint[GPT] | None:
    """The model that training starts from; its shape must be the one that is asked for."""
    if settings.start_from is None:
        return None
    try:
        origin = load_checkpoint(settings.start_from)
    except CheckpointError as error:
        raise ConfigError(f"start_from: {error}") from None
    found = asdict(origin.model.config)
    found["dropout"] = architecture.dropout
    found["hidden_feedback"] |= architecture.hidden_feedback  # it gets a gate
    for name, wanted in settings.architecture.plain().items():
        if found[name] != wanted:
            raise ConfigError(
                f"architecture.{name} must be {found[name]}, as in"
                f" start_from={cut(settings.start_from)}, got {wanted}"
            )
    return origin


def _model(origin: Checkpoint[GPT] | None, architecture: GPTConfig, *, seed: int) -> GPT:
    """A fresh model, or the one to start from with the dropout and the gate that are asked for."""
    if origin is not None:  # no setting says it
        architecture = replace(architecture, activation=origin.model.config.activation)
    model = GPT(architecture, tied=origin is None or origin.model.tied)
    model.initialize(generator=torch.Generator().manual_seed(seed))
    if origin is not None:  # of what was drawn a new gate remains, which starts closed
        model.load_state_dict(origin.model.state_dict(), strict=False)
    return model


def _take(output: Path, settings: TrainSettings) -> None:
    """Make the folder this training's: it is already, is empty, or another was refused there."""
    for name in (CONFIG, TOKENIZER, STATE, HISTORY, DEPTHS, CARD):
        files.remove_partial(output / name)
    folder, ours = cut(repr(str(output))), settings.deciding()
    names = {place.name for place in output.iterdir()} - {LOCK}
    if CONFIG not in names and names:
        raise ConfigError(
            f"output {folder} is not empty and holds no training: choose another folder"
        )
    if settings.same_training(found := read_config(output, CONFIG)):
        return
    # what a training that has saved no state yet can have written
    begun = names - {CONFIG, TOKENIZER, TRACKER}
    if names and (begun or found is None or found.keys() != ours.keys()):
        what = "other settings" if found is not None else f"an unreadable {CONFIG}"
        raise ConfigError(
            f"output {folder} holds a training with {what}: choose another folder, or remove it"
        )
    files.write_text(output / CONFIG, OmegaConf.to_yaml(ours))


def _lack(output: Path, settings: TrainSettings) -> str | None:
    """What is not there, or not whole, of this very training; None if it is done."""
    if not settings.same_training(read_config(output, CONFIG)):
        return f"no {CONFIG} of ours"
    if not (output / CARD).exists():
        return f"no {CARD}"
    depths = files.read_json(output / DEPTHS)
    try:
        load_checkpoint(output)
    except CheckpointError as error:
        return cut(error)
    if not isinstance(depths, dict):
        return f"unreadable {DEPTHS}"
    return files.changed(output, depths.get("checksums"))


def _tokenizer(settings: TrainSettings, texts: Iterable[str]) -> Tokenizer:
    try:
        if settings.tokenizer != "bpe":
            return load_tokenizer(settings.tokenizer)
        # made again in a second: one that is there could be damaged
        path = Path(settings.output, TOKENIZER)
        size = settings.architecture.vocab_size
        trained = train_bpe(texts, vocab_size=size, name=path.parent.name)
        files.write_atomically(path, lambda partial: save_tokenizer(trained, partial))
        return load_tokenizer(path)
    except TokenizerError as error:
        known = str(error).startswith("tokenizer ")
        raise ConfigError(str(error) if known else f"tokenizer: {error}") from None
    except ImportError:
        message = "tokenizer=bpe needs rustbpe: pip install -e '.[train]' -c constraints.txt"
        raise ConfigError(message) from None


def _open_tracker(settings: TrainSettings, output: Path, sources: str) -> Tracker:
    shutil.rmtree(output / "wandb", ignore_errors=True)  # its history is logged again, from ours
    return Tracker(
        settings.tracking,
        # two trainings of one name are two runs; one that is resumed stays the same
        run_id=files.short_hash([str(output.resolve()), read_config(output, CONFIG), sources]),
        name=output.name,
        group="train",
        tags=["train"],
        config=settings.plain(),
        folder=output,
        axis="step",
        measures=dict.fromkeys(MEASURES, "step"),
    )


def _card(training: Training, texts: list[dict[str, str]], asked: Asked, loss: str) -> str:
    """The text of a model folder's README.md: what it was trained on, how, how well it predicts."""
    model, shape, settings = training.model, training.model.config, training.settings
    chosen, corpus = settings.training, settings.corpus
    measured = "python -m scripts.held_out_loss --model THIS_FOLDER"
    measured += f" --texts {shlex.quote(corpus.held_out)}"
    measured += " --documents line" if corpus.documents == "line" else ""
    ways = ("draw_passes", "through_passes", "update_every_pass")
    passes = ", ".join([str(chosen.passes), *(way for way in ways if getattr(chosen, way))])
    read_from, held_out = (printable(", ".join(Path(n).stem for n in each)) for each in texts)
    on = [(one["device"], one["threads"]) for one in training.origins]
    devices = [f"{name}, {count} thread{'s' if count > 1 else ''}" for name, count in on]
    more = ", with uncommitted changes"
    commits = [f"{one['commit']}{more if one['changes'] else ''}" for one in training.origins]
    rows = {
        "start": "from scratch" if settings.start_from is None else f"`{settings.start_from}`",
        "size": f"{model.count_parameters():,} parameters: {shape.n_layer} layers ×"
        f" {shape.n_embd}, {shape.n_head} heads",
        "reads": f"{shape.block_size} tokens at a time, {shape.vocab_size:,} ids",
        "tokenizer": settings.tokenizer if settings.start_from is None else "as it started",
        "trained on": f"{read_from} ({training.corpus.size:,} tokens)",
        "held out": f"{held_out}: {loss}",
        "measured by": f"`{measured}`",
        "recipe": f"`{asked.command_of_this_run or 'unknown'}`",
        "seed": settings.seed,
        "steps": f"{training.step:,} of {chosen.batch_size} × {shape.block_size} tokens",
        "passes": passes,
        "hardware": ", then ".join(dict.fromkeys(devices)),
        "time": f"{training.seconds:,.1f} s",
        "commit": ", then ".join(dict.fromkeys(commits)),
        "PyTorch": torch.__version__,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# {Path(settings.output).name}\n\nA GPT of nanoGPT's architecture, trained by this"
        f" project. Its weights are stored in float16.\n\n| | |\n|---|---|\n{table}\n"
    )
