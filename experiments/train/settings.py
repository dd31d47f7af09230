"""The settings of a training."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from experiments.converge.settings import TrackingSettings, TrainingDeviceSettings
from experiments.settings import Count, Number, Positive, Seed, Settings

NotNegative = Annotated[Number, Field(ge=0)]


class CorpusSettings(Settings):
    train: str
    held_out: str
    documents: Literal["file", "line"] = "file"


class ArchitectureSettings(Settings):
    block_size: Count = 256
    vocab_size: Count = 4096
    n_layer: Count = 6
    n_head: Count = 3
    n_embd: Count = 192
    dropout: Number = Field(default=0.1, ge=0, lt=1, description="at least 0 and below 1")
    bias: bool = False
    hidden_feedback: bool = False


class TrainingSettings(Settings):
    steps: Count = 1500
    batch_size: Count = 16
    learning_rate: Positive = 4e-3
    matrix_learning_rate: Positive = 2e-2
    final_fraction: Number = Field(default=0.0, ge=0, le=1)
    warmup_steps: Count = 50
    weight_decay: NotNegative = 0.1
    grad_clip: Positive = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["sdpa", "reference"] = "sdpa"
    passes: Count = 1
    draw_passes: bool = False
    through_passes: bool = False
    update_every_pass: bool = False
    evaluate_every: Count = 250
    evaluate_depth: Count = 8
    evaluate_windows: Count = 64
    final_windows: Count | None = None
    save_every_seconds: NotNegative = 60.0

    def conflicts(self) -> Iterator[str]:
        if self.through_passes and self.update_every_pass:
            yield (
                "training.through_passes and training.update_every_pass cannot both be true: no"
                " gradient passes through hidden states of weights that have been updated"
            )


class TrainSettings(Settings):
    """One training: everything ``experiments.train`` can be told."""

    corpus: CorpusSettings
    tokenizer: str = "bpe"
    architecture: ArchitectureSettings = ArchitectureSettings()
    training: TrainingSettings = TrainingSettings()
    device: TrainingDeviceSettings = TrainingDeviceSettings()
    tracking: TrackingSettings = TrackingSettings()
    start_from: str | None = None
    output: str
    seed: Seed = 0

    def deciding(self) -> dict[str, Any]:
        """What is trained, wherever and how fast."""
        return self.model_dump(mode="json", exclude={"output", "device", "tracking"})

    def same_training(self, kept: Any) -> bool:
        """Whether what was kept of a training is ``deciding()``, however often it was saved."""
        try:
            often = {"save_every_seconds": self.training.save_every_seconds}
            return bool(kept | {"training": kept["training"] | often} == self.deciding())
        except (LookupError, TypeError):
            return False

    def conflicts(self) -> Iterator[str]:
        if self.training.passes > 1 and not self.architecture.hidden_feedback:
            yield (
                "training.passes must be 1 without architecture.hidden_feedback=true, got"
                f" {self.training.passes}"
            )
        size = self.architecture.vocab_size
        if self.tokenizer == "bpe" and self.start_from is None and size < 257:
            yield (
                "architecture.vocab_size must be at least 257 with tokenizer=bpe, 256 bytes and the"
                f" end of a text, got {size}"
            )
