"""Train one contestant on one task, see how far it can follow the state, and keep that in a folder.

Shapes: B batch, T positions.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from experiments.runs.compute_once import ALONE, Asked, check_losses, compute_once, finished_already
from experiments.runs.files import short_hash, write_table
from experiments.runs.folder import ACCURACY, RunFolder
from experiments.state_tracking.settings import StateTrackingSettings
from experiments.state_tracking.tasks import Task, make_task, word_batch
from experiments.sweeps.report import contestant_of, name_of
from experiments.tracking.tracker import Tracker
from stateful_gpt.feedback import shift_right
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.train import TrainingConfig, make_optimizers, training_step

HISTORY = "history.parquet"
GOOD = 0.9  # accuracy at which a level counts as solved


def locate(settings: StateTrackingSettings, known: object = None) -> RunFolder:
    """The run that these settings stand for, named by a hash of all that can change a result."""
    path = Path(settings.runs_dir, settings.study, short_hash(settings.deciding()))
    return RunFolder(path, settings.plain())


def track(settings: StateTrackingSettings, asked: Asked = ALONE) -> Path:
    """Run the contest of these settings unless that is done; returns the run folder. Raises
    ConfigError or, of a run that broke off, RunError.
    """
    device = settings.device.found()
    folder = locate(settings)
    if finished_already(folder):
        return folder.path
    chosen, contestant = settings.task, settings.contestant
    name = contestant_of(folder.config)

    def compute(tracker: Tracker) -> Callable[[], object]:
        task = make_task(chosen.name, chosen.target)
        started = time.process_time()
        with asked.progress(settings.training.steps * contestant.times, "step", name) as bar:
            model, history, passes = train_contestant(settings, task, device, on_step=bar.update)
        seconds = time.process_time() - started
        # depth 0 is all there is of a plain model; the last one is full recurrence
        depth = chosen.tested_level - 1 if contestant.passes > 1 else 0
        accuracy = accuracy_by_depth(model, task, words=settings.test_words, depth=depth)
        full = accuracy[-1]
        summary: dict[str, Any] = {
            "run_id": folder.id,
            "study": settings.study,
            "task": chosen.name,
            "target": chosen.target,
            "contestant": name,
            "seed": settings.seed,
            "accuracy_trained": full[chosen.trained_level - 1],
            "accuracy_tested": full[-1],
            # the last one before accuracy first falls below GOOD
            "solved_level": next((k for k, share in enumerate(full) if share < GOOD), len(full)),
            "chance": task.chance,  # of always giving the most frequent answer
            "parameters": model.count_parameters(),
            "layer_passes": passes * contestant.layers,  # evaluated in training, per window
            "seconds": round(seconds, 2),  # of processor time, in training
        }
        rows = [
            {"depth": depth, "level": level, "accuracy": value}
            for depth, row in enumerate(accuracy)
            for level, value in enumerate(row, start=1)
        ]
        write_table(folder.path / ACCURACY, pa.Table.from_pylist(rows))
        write_table(folder.path / HISTORY, pa.Table.from_pylist(history))
        folder.summarize(summary)

        def publish() -> None:
            for row in history:
                tracker.log(row)
            tracker.summarize(summary)

        return publish

    compute_once(
        folder,
        asked=asked,
        device=device,
        open_tracker=lambda: Tracker(
            settings.tracking,
            run_id=folder.id,
            name=f"{name_of(folder.config)}, seed {settings.seed}",
            group=settings.study,
            tags=[chosen.name, chosen.target],
            config=folder.config,
            folder=folder.path,
            axis="step",
            measures={"loss_*": "step"},
        ),
        compute=compute,
        shorten="task.tested_level or test_words",
    )
    return folder.path


def train_contestant(
    settings: StateTrackingSettings,
    task: Task,
    device: torch.device,
    *,
    on_step: Callable[[], object],
) -> tuple[GPT, list[dict[str, float]], int]:
    """The trained model, losses every ``training.record_every`` steps, and the passes made.

    Raises RunError if it diverges.
    """
    asked, contestant, recipe = settings.task, settings.contestant, settings.training
    config = TrainingConfig(
        steps=recipe.steps * contestant.times,
        passes=contestant.passes,
        through_passes=contestant.through,
        draw_passes=contestant.drawn,
        **recipe.model_dump(exclude={"steps", "record_every"}),
    )
    architecture = GPTConfig(
        block_size=asked.tested_level,
        vocab_size=task.vocab_size,
        n_layer=contestant.layers,
        n_head=settings.size.n_head,
        n_embd=settings.size.n_embd,
        hidden_feedback=contestant.passes > 1,
    )
    model = GPT(architecture)
    model.initialize(generator=torch.Generator().manual_seed(settings.seed))
    model.to(device)
    optimizers = make_optimizers(model, config)
    history: list[dict[str, float]] = []
    passes_made = 0
    for step in range(config.steps):
        tokens, targets = word_batch(
            task,
            seed=settings.seed * 1_000_003 + step,
            size=config.batch_size,
            level=asked.trained_level,
            length=asked.tested_level,
        )
        losses = training_step(
            model,
            optimizers,
            tokens.to(device),
            step=step,
            config=config,
            seed=settings.seed,
            targets=targets.to(device),
        )
        check_losses(losses, step + 1)
        passes_made += len(losses)
        on_step()
        if (step + 1) % recipe.record_every == 0 or step + 1 == config.steps:
            history.append({"step": step + 1, "loss_first": losses[0], "loss_last": losses[-1]})
    return model, history, passes_made


@torch.no_grad()
def accuracy_by_depth(model: GPT, task: Task, *, words: int, depth: int) -> list[list[float]]:
    """The share of right answers: ``[n][k]`` at depth n up to ``depth``, and level k + 1.

    With T positions, depth T - 1 is the fixed point, which reading from left to right has.
    """
    level = model.block_size  # words that fill their windows, the same for every contestant
    batch = word_batch(task, seed=2**60, size=words, level=level, length=level)
    tokens, targets = (ids.to(model.device) for ids in batch)
    accuracy: list[list[float]] = []
    fed: Tensor | None = None
    for _ in range(depth + 1):
        hidden = model.read(tokens, modulation=Modulation(hidden=fed))
        said = model.logits(hidden).argmax(dim=-1)  # (B, T), of all ids
        accuracy.append((said == targets).double().mean(dim=0).tolist())
        fed = shift_right(hidden)
    return accuracy
