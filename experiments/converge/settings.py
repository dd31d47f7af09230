"""The settings of a convergence run, and those that all runners share.

Imports no torch: names that the library has are repeated here, and a test holds them together.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from experiments.settings import ConfigError, Count, Number, Positive, Seed, Settings, Whole
from stateful_gpt.console import cut

if TYPE_CHECKING:
    import torch

StudyName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="1 to 100 letters, digits, dots, dashes or underscores and begin with a letter"
        " or digit",
    ),
]
Folder = Annotated[
    str,
    Field(
        min_length=1,
        max_length=2000,
        pattern=r"^[^/\x00]{0,255}(/[^/\x00]{0,255})*$",
        description="a folder, not empty, of at most 2,000 characters and 255 between slashes",
    ),
]
SHIPPED = ("bundled", "bundled_stateful")  # models


class ModelSettings(Settings):
    name: str = "bundled"
    path: str = Field(default="bundled", min_length=1, description="a file, folder or name")
    tokenizer: str | None = None
    library: Literal["stateful_gpt", "transformers"] = "stateful_gpt"  # what reads it

    @model_validator(mode="before")
    @classmethod
    def _another_model_has_another_name(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("name") in SHIPPED:
            path = given.get("path", "bundled")
            return {**given, "name": path if path in SHIPPED else "checkpoint"}
        return given


class FeedbackSettings(Settings):
    kind: Literal["log_prob", "logit", "prob", "hidden_state", "none"] = "log_prob"
    strength: Number = 0.5
    layers: (
        Literal["all"] | Annotated[tuple[Annotated[Whole, Field(ge=0)], ...], Field(min_length=1)]
    ) = Field(default="all", description="'all' or a list of layer numbers from 0, such as [0,1]")
    shift: Literal[0, 1] = 1
    hidden_strength: Number = 0.0

    @field_validator("layers")
    @classmethod
    def _each_once_in_order(cls, layers: Any) -> Any:
        return layers if layers == "all" else tuple(sorted(set(layers)))

    def conflicts(self) -> Iterator[str]:
        alone = self.kind == "hidden_state"
        if alone and self.layers != "all":
            yield (
                "feedback.layers must be all with feedback=hidden_state, which enriches embeddings,"
                f" got {list(self.layers)}"
            )
        if self.hidden_strength != 0 and (alone or self.kind == "none"):
            yield (
                f"feedback.hidden_strength must be 0 with feedback={self.kind}: it adds hidden"
                " states to a feedback of tokens, and alone they are feedback=hidden_state with"
                f" feedback.strength, got {self.hidden_strength}"
            )
        if self.shift == 0 and not alone and self.hidden_strength == 0:
            yield "feedback.shift must be 1 where no hidden states are fed back, got 0"


class RecomputeSettings(Settings):
    solver: Literal["full", "windowed"] = "full"
    window: Literal["all", "auto"] | Count | None = Field(
        default=None,
        description="all, auto or a whole number of at least 1 (1 reads from left to right)",
    )
    iterations: Count = 64
    tolerance: Literal["auto"] | Annotated[Number, Field(ge=0)] = "auto"
    damping: Number = Field(
        default=1.0, gt=0, le=1, description="above 0 and at most 1 (1 is undamped)"
    )
    start: Literal["cold", "carried"] = "cold"

    def conflicts(self) -> Iterator[str]:
        if self.solver == "full" and self.window is not None:
            yield (
                f"recompute.window needs recompute=windowed, got {self.window!r} with"
                " recompute=full"
            )
        if self.solver == "windowed" and self.window is None:
            yield (
                "recompute.window must be all, auto or a whole number of at least 1 with"
                " recompute=windowed, got null"
            )
        if self.solver == "windowed" and self.damping != 1:
            yield (
                "recompute.damping must be 1 with recompute=windowed, as damped estimates never"
                f" are final, got {self.damping}"
            )


class GenerationSettings(Settings):
    strategy: Literal["greedy", "sample"] = "greedy"
    max_new_tokens: Whole = Field(default=0, ge=0)
    temperature: Positive = Field(
        default=1.0, description="above 0 (generation=greedy draws the most likely token)"
    )
    top_k: Count | None = None
    seed: Seed = 0
    slide: Count = 1


class PromptSettings(Settings):
    source: Literal["builtin", "file"] = "builtin"
    file: str | None = Field(
        default=None, pattern=r"\.(txt|jsonl)$", description="a file that ends in .txt or .jsonl"
    )
    split: Literal["text", "lines"] = "text"
    limit: Count | None = None
    max_tokens: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_file_is_the_source(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("file") is not None:
            return {**given, "source": "file"}
        return given

    def conflicts(self) -> Iterator[str]:
        if self.source == "file" and self.file is None:
            yield "prompts=file needs prompts.file, a .txt or .jsonl file, got nothing"
        if self.split == "lines" and not (self.file or "").endswith(".txt"):
            named = cut(repr(self.file))
            yield f"prompts.split=lines needs a prompts.file that ends in .txt, got {named}"


class MeasureSettings(Settings):
    oracle: bool = True
    lyapunov: bool = True
    kl: bool = True


class DeviceSettings(Settings):
    name: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    batch: Literal["auto"] | Count = "auto"

    def found(self) -> "torch.device":
        """The device of this name; raises ConfigError if it is not there."""
        from stateful_gpt.device import choose_device

        try:
            return choose_device(self.name)
        except ValueError as error:
            raise ConfigError(f"device.name: {error}") from None


class TrainingDeviceSettings(DeviceSettings):
    dtype: Literal["float32"] = Field(
        default="float32",
        description="float32 in training (training.precision=bfloat16 of experiments.train computes"
        " in less)",
    )


class TrackingSettings(Settings):
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = Field(
        default="stateful_gpt",
        pattern=r"^[^/\\#?%:]{1,128}$",
        description=r"1 to 128 characters other than / \ # ? % :",
    )
    entity: str | None = None


class ConvergeSettings(Settings):
    """One convergence run: everything ``experiments.converge`` can be told."""

    model: ModelSettings = ModelSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    recompute: RecomputeSettings = RecomputeSettings()
    generation: GenerationSettings = GenerationSettings()
    prompts: PromptSettings = PromptSettings()
    measures: MeasureSettings = MeasureSettings()
    device: DeviceSettings = DeviceSettings()
    tracking: TrackingSettings = TrackingSettings()
    study: StudyName = "default"
    runs_dir: Folder = "runs"
    seed: Seed = 0
    reporting_tolerance: Positive = 1e-3

    def conflicts(self) -> Iterator[str]:
        if self.recompute.solver == "windowed" and self.feedback.shift == 0:
            yield (
                "feedback.shift must be 1 with recompute=windowed, as nothing else becomes final"
                " from left to right, got 0"
            )

    def deciding(self) -> dict[str, Any]:
        """What can change a result: neither device, nor places and names, nor model and prompts,
        which count by their content. What a setting was before there was a key for it is left out,
        so that runs of that time keep their names.
        """
        left_out = {"runs_dir", "study", "tracking", "model", "prompts", "device"}
        plain = self.model_dump(mode="json", exclude=left_out) | {"dtype": self.device.dtype}
        feedback, recompute, generation = (
            plain[name] for name in ("feedback", "recompute", "generation")
        )
        feedback["strength"] += 0.0  # -0.0 is 0.0
        if recompute["tolerance"] != "auto":
            recompute["tolerance"] += 0.0
        for group, key, before in (
            (feedback, "hidden_strength", 0),
            (recompute, "window", None),
            (generation, "slide", 1),
            (plain, "measures", MeasureSettings().plain()),
        ):
            if group[key] == before:
                del group[key]
        return plain
