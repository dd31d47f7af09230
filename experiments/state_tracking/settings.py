"""The settings of a state-tracking run."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from experiments.converge.settings import (
    Folder,
    StudyName,
    TrackingSettings,
    TrainingDeviceSettings,
)
from experiments.settings import Count, Number, Positive, Seed, Settings


class TaskSettings(Settings):
    name: Literal["cups", "modulo"] = "cups"
    target: Literal["state", "half"] = "state"
    trained_level: Count = 8
    tested_level: Count = 16

    def conflicts(self) -> Iterator[str]:
        least, found = self.trained_level, self.tested_level
        if found < least:
            yield f"task.tested_level must be at least task.trained_level ({least}), got {found}"


class ContestantSettings(Settings):
    layers: Count = 1
    passes: Count = 1
    through: bool = False
    drawn: bool = False
    times: Count = 1

    def conflicts(self) -> Iterator[str]:
        for name in ("through", "drawn"):
            if self.passes == 1 and getattr(self, name):
                yield (
                    f"contestant.{name} must be false with contestant.passes=1, which feeds nothing"
                    " back, got true"
                )


class SizeSettings(Settings):
    n_embd: Count = 32
    n_head: Count = 2

    def conflicts(self) -> Iterator[str]:
        width, heads = self.n_embd, self.n_head
        if width % heads != 0:
            yield f"size.n_embd must be a multiple of size.n_head ({heads}), got {width}"


class RecipeSettings(Settings):
    steps: Count = 600
    batch_size: Count = 32
    learning_rate: Positive = 1e-2
    matrix_learning_rate: Positive = 5e-2
    warmup_steps: Count = 50
    weight_decay: Number = Field(default=0.01, ge=0)
    record_every: Count = 50


class StateTrackingSettings(Settings):
    """One contestant on one task: everything ``experiments.state_tracking`` can be told."""

    task: TaskSettings = TaskSettings()
    contestant: ContestantSettings = ContestantSettings()
    size: SizeSettings = SizeSettings()
    training: RecipeSettings = RecipeSettings()
    test_words: Count = 1024
    device: TrainingDeviceSettings = TrainingDeviceSettings()
    tracking: TrackingSettings = TrackingSettings()
    study: StudyName = "state_tracking"
    runs_dir: Folder = "runs"
    seed: Seed = 0

    def deciding(self) -> dict[str, Any]:
        """What can change a result: neither device, nor places and names."""
        return self.model_dump(mode="json", exclude={"runs_dir", "study", "tracking", "device"})
