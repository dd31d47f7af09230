"""The settings of a training: typed and checked."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from experiments.converge.settings import DeviceSettings, TrackingSettings, check_common
from experiments.settings import (
    ConfigError,
    check_at_least,
    check_finite,
    check_one_of,
    know_schemas,
)


@dataclass
class CorpusSettings:
    train: str = MISSING
    held_out: str = MISSING
    documents: str = "file"


@dataclass
class ArchitectureSettings:
    block_size: int = 256
    vocab_size: int = 4096
    n_layer: int = 6
    n_head: int = 3
    n_embd: int = 192
    dropout: float = 0.1
    bias: bool = False
    hidden_feedback: bool = False


@dataclass
class TrainingSettings:
    steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 4e-3
    matrix_learning_rate: float = 2e-2
    final_fraction: float = 0.0
    warmup_steps: int = 50
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    precision: str = "float32"
    attention: str = "sdpa"
    passes: int = 1
    draw_passes: bool = False
    through_passes: bool = False
    update_every_pass: bool = False
    evaluate_every: int = 250
    evaluate_depth: int = 8
    evaluate_windows: int = 64
    final_windows: int | None = None
    save_every_seconds: float = 60.0


@dataclass
class TrainSettings:
    """One training: everything ``experiments.train`` can be told."""

    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    tokenizer: str = "bpe"
    architecture: ArchitectureSettings = field(default_factory=ArchitectureSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    device: DeviceSettings = field(default_factory=DeviceSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    start_from: str | None = None
    output: str = MISSING
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError at the first value that is impossible."""
        for name in ("steps", "batch_size", "warmup_steps", "evaluate_every", "passes"):
            check_at_least(f"training.{name}", getattr(self.training, name), 1)
        for name in ("evaluate_depth", "evaluate_windows"):
            check_at_least(f"training.{name}", getattr(self.training, name), 1)
        if self.training.final_windows is not None:
            check_at_least("training.final_windows", self.training.final_windows, 1)
        check_one_of("corpus.documents", self.corpus.documents, ("file", "line"))
        if self.training.passes > 1 and not self.architecture.hidden_feedback:
            raise ConfigError(
                "training.passes must be 1 without architecture.hidden_feedback=true, got"
                f" {self.training.passes}"
            )
        if self.training.through_passes and self.training.update_every_pass:
            raise ConfigError(
                "training.through_passes and training.update_every_pass cannot both be true: no"
                " gradient passes through hidden states of weights that have been updated"
            )
        for name in ("learning_rate", "matrix_learning_rate", "grad_clip"):
            value = getattr(self.training, name)
            check_finite(f"training.{name}", value)
            if value <= 0:
                raise ConfigError(f"training.{name} must be above 0, got {value}")
        check_at_least("training.weight_decay", self.training.weight_decay, 0)
        check_at_least("training.save_every_seconds", self.training.save_every_seconds, 0)
        if not 0 <= self.training.final_fraction <= 1:
            raise ConfigError(
                f"training.final_fraction must be from 0 to 1, got {self.training.final_fraction}"
            )
        check_one_of("training.precision", self.training.precision, ("float32", "bfloat16"))
        check_one_of("training.attention", self.training.attention, ("sdpa", "reference"))
        if self.device.dtype != "float32":
            raise ConfigError(
                "device.dtype must be float32 in training (training.precision=bfloat16 computes"
                f" in less), got {self.device.dtype!r}"
            )
        check_common(self.device, self.tracking, self.seed)


def register_schemas() -> None:
    """Make the schema known to Hydra, as the first entry of the primary config's defaults."""
    ConfigStore.instance().store(name="train_schema", node=TrainSettings)


know_schemas(TrainSettings, CorpusSettings, ArchitectureSettings, TrainingSettings)
