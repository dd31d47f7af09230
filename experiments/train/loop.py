"""One training on its way: model, optimizers and history, saved often, resumed where it was saved.

Knows nothing of Hydra, tokenizers or model cards.
"""

import hashlib
import io
import json
import pickle
import sys
import time
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from experiments.runs.compute_once import check_losses
from experiments.runs.files import short_hash, write_atomically, write_json
from experiments.tracking.tracker import Tracker, warn
from experiments.train.corpus import Corpus
from experiments.train.settings import TrainSettings
from stateful_gpt.depth import DepthProfile, depth_profile
from stateful_gpt.model import GPT
from stateful_gpt.train import TrainingConfig, make_optimizers, training_step

STATE = "training_state.pt"
HISTORY = "history.json"
# what is saved beside weights, optimizers, random numbers and history
_COUNTS = ("step", "seconds", "tokens_read", "loss", "origins")
_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
    *(OSError, ValueError, RuntimeError, EOFError, TypeError, KeyError),
)


class Training:
    """Model, optimizers and history of one training, and the folder where they are kept."""

    def __init__(
        self, settings: TrainSettings, model: GPT, train: Corpus, held_out: Corpus, output: Path
    ) -> None:
        self.settings, self.model, self.output = settings, model, output
        self.corpus, self.held_out = train, held_out
        chosen = settings.training
        names = {field.name for field in fields(TrainingConfig)}
        self.config = TrainingConfig(
            **chosen.model_dump(include=names), autocast=chosen.precision == "bfloat16"
        )
        self.optimizers = make_optimizers(model, self.config)
        self.step = 0
        self.seconds = 0.0
        self.tokens_read = 0  # in all passes: what training has cost, up to a factor
        self.loss: float | None = None  # smoothed
        self.history: list[dict[str, Any]] = []
        self.origins: list[dict[str, Any]] = []  # of all attempts: what can make steps differ
        read = [train.tokens, held_out.tokens]
        if settings.start_from is not None:
            read += model.state_dict().values()
        digests = [hashlib.sha256(tensor.cpu().numpy().data).hexdigest() for tensor in read]
        self._texts = short_hash(digests)  # and the weights that it starts from
        self._resume()

    def run(self, tracker: Tracker) -> None:
        """Raises RunError if the loss is no number any more."""
        for row in self.history:
            tracker.log(_flat(row))
        saved_at = time.monotonic()
        started = saved_at - self.seconds
        chosen, seed = self.settings.training, self.settings.seed
        with tqdm(total=self.config.steps, initial=self.step, unit="step", disable=None) as bar:
            while self.step < self.config.steps:
                windows = self.corpus.batch(self.step, size=self.config.batch_size, seed=seed)
                # "reference" is attention without a fused kernel: every step of it written out
                reference = chosen.attention == "reference"
                with sdpa_kernel(SDPBackend.MATH) if reference else nullcontext():
                    losses = training_step(
                        self.model,
                        self.optimizers,
                        windows.to(self.model.device),
                        step=self.step,
                        config=self.config,
                        seed=seed,
                    )
                check_losses(losses, self.step)
                self.loss = losses[0] if self.loss is None else 0.95 * self.loss + 0.05 * losses[0]
                self.tokens_read += windows[:, 1:].numel() * len(losses)
                self.step += 1
                bar.update()
                self.seconds = time.monotonic() - started
                if self.step % chosen.evaluate_every == 0 or self.step == self.config.steps:
                    self.history.append(self._evaluate())
                    tracker.log(_flat(self.history[-1]))
                if time.monotonic() - saved_at >= chosen.save_every_seconds:
                    self._save()
                    saved_at = time.monotonic()
        self._save()

    def profile(self, model: GPT, *, depth: int, full: bool, windows: int | None) -> DepthProfile:
        """Held-out loss and movement by depth, of some windows spread over the text, or of all."""
        table = self.held_out.windows()
        if windows is not None and windows < len(table):
            table = table[torch.linspace(0, len(table) - 1, windows).long()]
        found = depth_profile(model, table, depth=depth, full=full)
        check_losses(found.nll, self.step)
        return found

    def _evaluate(self) -> dict[str, Any]:
        # of the whole text, so that models with and without a gate can be compared on the way
        loss = self.profile(self.model, depth=0, full=False, windows=None).nll[0]
        row: dict[str, Any] = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "tokens_read": self.tokens_read,
            "train_loss": self.loss,
            "held_out_loss": loss,
            "held_out_nats_per_character": loss / self.held_out.characters_per_prediction,
        }
        said = f"held out {loss:.4f} nats/token"
        if self.model.gate is not None:  # depths cost a pass each: a part of the text has to do
            chosen = self.settings.training
            depth, windows = chosen.evaluate_depth, chosen.evaluate_windows
            part = self.profile(self.model, depth=depth, full=False, windows=windows)
            nll, broken = part.nll, part.broken_at
            row |= {"nll_by_depth": nll, "kl_by_depth": part.kl, "contracts": broken is None}
            falls = f"does not fall at depth {broken}" if broken else "falls with every pass"
            said += f", of up to {windows} windows {nll[0]:.4f}, {nll[1]:.4f} at depth 1"
            said += f", {nll[-1]:.4f} at {depth}; KL {falls}"
        where = f"step {self.step:6d}  {self.seconds:6.0f} s  train {self.loss:.3f}"
        tqdm.write(f"{where}  {said}", file=sys.stdout)
        sys.stdout.flush()
        return row

    def _save(self) -> None:
        state = {
            "settings": self.settings.deciding(),
            "texts": self._texts,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "history": json.dumps(self.history),
            **{name: getattr(self, name) for name in _COUNTS},
        }
        whole = io.BytesIO()  # into a file, torch makes a RuntimeError of a full disk
        torch.save(state, whole)
        write_atomically(self.output / STATE, lambda path: path.write_bytes(whole.getbuffer()))
        write_json(self.output / HISTORY, self.history)

    def _resume(self) -> None:
        """Go on from the state in the folder, unless it is damaged or another training's."""
        path = self.output / STATE
        if not path.exists():
            return
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()  # it has a checksum of each of its parts
            state = torch.load(path, map_location=self.model.device, weights_only=True)
            ours = self.settings.same_training(state["settings"]) and state["texts"] == self._texts
            known = broken is None and ours
        except _DAMAGE:  # some early versions did not say what they read
            known = False
        if not known:
            what = "damaged, or of other settings, texts or starting weights"
            warn(f"{path} is {what}: this training begins anew")
            return
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        self.history = json.loads(state["history"])
        for name in _COUNTS:  # some early versions did not say their origins
            setattr(self, name, state.get(name, getattr(self, name)))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for the tracker: a list becomes one metric for each depth."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        listed = isinstance(value, list)
        flat |= {f"{key}/{n}": x for n, x in enumerate(value)} if listed else {key: value}
    return flat
