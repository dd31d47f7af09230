"""The settings of a state-tracking run: typed and checked."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from experiments.converge.settings import STUDY_NAME, DeviceSettings, TrackingSettings, check_common
from experiments.settings import ConfigError, know_schemas
from experiments.state_tracking.tasks import TASKS, Target


@dataclass
class TaskSettings:
    name: str = "cups"
    target: str = "state"
    trained_level: int = 8
    tested_level: int = 16


@dataclass
class ContestantSettings:
    layers: int = 1
    passes: int = 1
    through: bool = False
    drawn: bool = False
    times: int = 1


@dataclass
class SizeSettings:
    n_embd: int = 32
    n_head: int = 2


@dataclass
class RecipeSettings:
    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 1e-2
    matrix_learning_rate: float = 5e-2
    warmup_steps: int = 50
    weight_decay: float = 0.01
    record_every: int = 50


@dataclass
class StateTrackingSettings:
    """One contestant on one task: everything ``experiments.state_tracking`` can be told."""

    task: TaskSettings = field(default_factory=TaskSettings)
    contestant: ContestantSettings = field(default_factory=ContestantSettings)
    size: SizeSettings = field(default_factory=SizeSettings)
    training: RecipeSettings = field(default_factory=RecipeSettings)
    test_words: int = 1024
    device: DeviceSettings = field(default_factory=DeviceSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    study: str = "state_tracking"
    runs_dir: str = "runs"
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError at the first value that is impossible."""
        check_common(self.device, self.tracking, self.seed)
        if self.device.dtype != "float32":
            raise ConfigError(f"device.dtype must be float32 here, got {self.device.dtype!r}")
        _one_of("task.name", self.task.name, list(TASKS))
        _one_of("task.target", self.task.target, [target.value for target in Target])
        for section, names in (
            ("task", ("trained_level", "tested_level")),
            ("contestant", ("layers", "passes", "times")),
            ("size", ("n_embd", "n_head")),
            ("training", ("steps", "batch_size", "warmup_steps", "record_every")),
            ("", ("test_words",)),
        ):
            place = getattr(self, section) if section else self
            for name in names:
                _count(f"{section}.{name}".lstrip("."), getattr(place, name))
        if self.task.tested_level < self.task.trained_level:
            raise ConfigError(
                f"task.tested_level must be at least task.trained_level ({self.task.trained_level})"
                f", got {self.task.tested_level}"
            )
        for name in ("through", "drawn"):
            if self.contestant.passes == 1 and getattr(self.contestant, name):
                raise ConfigError(
                    f"contestant.{name} must be false with contestant.passes=1, which feeds nothing"
                    " back, got true"
                )
        if self.size.n_embd % self.size.n_head:
            raise ConfigError(
                f"size.n_embd must be a multiple of size.n_head ({self.size.n_head}), got"
                f" {self.size.n_embd}"
            )
        for name in ("learning_rate", "matrix_learning_rate"):
            if not 0 < getattr(self.training, name) < float("inf"):
                raise ConfigError(
                    f"training.{name} must be a finite number above 0,"
                    f" got {getattr(self.training, name)}"
                )
        if not 0 <= self.training.weight_decay < float("inf"):
            raise ConfigError(
                "training.weight_decay must be a finite number of at least 0,"
                f" got {self.training.weight_decay}"
            )
        if not STUDY_NAME.fullmatch(self.study):
            raise ConfigError(
                "study must be 1 to 100 letters, digits, dots, dashes or underscores and begin"
                f" with a letter or digit, got {self.study!r}"
            )
        if not self.runs_dir:
            raise ConfigError("runs_dir must name a folder, got an empty text")


def register() -> None:
    """Make the schema known to Hydra and to the words for what is wrong."""
    ConfigStore.instance().store(name="state_tracking_schema", node=StateTrackingSettings)
    know_schemas(
        StateTrackingSettings, TaskSettings, ContestantSettings, SizeSettings, RecipeSettings
    )


def _one_of(key: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")


def _count(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{key} must be at least 1, got {value}")
