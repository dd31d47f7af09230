"""The settings of a convergence run, and those that all runners share: typed and checked.

Each dataclass is the schema of a Hydra group. They are not frozen because OmegaConf makes a frozen
schema read-only, which would refuse the user's overrides.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from experiments.settings import (
    ConfigError,
    check_at_least,
    check_finite,
    check_one_of,
    check_seed,
    know_schemas,
)
from stateful_gpt.device import DEVICES, DTYPES
from stateful_gpt.feedback import HIDDEN_STATE, KINDS, FeedbackKind
from stateful_gpt.generate import Start

STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TRACKING_MODES = ("offline", "online", "disabled")
STRATEGIES = ("greedy", "sample")
SOLVERS = ("full", "windowed")


@dataclass
class ModelSettings:
    name: str = "bundled"
    path: str = MISSING
    tokenizer: str | None = None


@dataclass
class FeedbackSettings:
    kind: str = "log_prob"
    strength: float = 0.5
    layers: Any = "all"
    shift: int = 1
    hidden_strength: float = 0.0


@dataclass
class RecomputeSettings:
    solver: str = "full"
    window: Any = None
    iterations: int = 64
    tolerance: float = 0.0
    damping: float = 1.0
    start: str = "cold"


@dataclass
class GenerationSettings:
    strategy: str = "greedy"
    max_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0


@dataclass
class PromptSettings:
    source: str = "builtin"
    file: str | None = None
    limit: int | None = None
    max_tokens: int | None = None


@dataclass
class DeviceSettings:
    name: str = "auto"
    dtype: str = "float32"


@dataclass
class TrackingSettings:
    mode: str = "offline"
    project: str = "stateful_gpt"
    entity: str | None = None


@dataclass
class ConvergeSettings:
    """One convergence run: everything ``experiments.converge`` can be told."""

    model: ModelSettings = field(default_factory=ModelSettings)
    feedback: FeedbackSettings = field(default_factory=FeedbackSettings)
    recompute: RecomputeSettings = field(default_factory=RecomputeSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    device: DeviceSettings = field(default_factory=DeviceSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    study: str = "default"
    runs_dir: str = "runs"
    seed: int = 0
    reporting_tolerance: float = 1e-3

    def check(self) -> None:
        """Raise ConfigError at the first value that is impossible."""
        check_common(self.device, self.tracking, self.seed)
        _feedback(self.feedback)
        check_one_of("recompute.solver", self.recompute.solver, SOLVERS)
        _window(self.recompute)
        if self.recompute.solver == "windowed" and self.feedback.shift == 0:
            raise ConfigError(
                "feedback.shift must be 1 with recompute=windowed, as nothing else becomes final"
                " from left to right, got 0"
            )
        check_at_least("recompute.iterations", self.recompute.iterations, 1)
        check_at_least("recompute.tolerance", self.recompute.tolerance, 0)
        check_finite("recompute.damping", self.recompute.damping)
        if not 0 < self.recompute.damping <= 1:
            raise ConfigError(
                "recompute.damping must be above 0 and at most 1 (1 is undamped),"
                f" got {self.recompute.damping}"
            )
        check_one_of("recompute.start", self.recompute.start, [start.value for start in Start])
        check_one_of("generation.strategy", self.generation.strategy, STRATEGIES)
        check_at_least("generation.max_new_tokens", self.generation.max_new_tokens, 0)
        check_finite("generation.temperature", self.generation.temperature)
        if self.generation.temperature <= 0:
            raise ConfigError(
                "generation.temperature must be above 0 (generation=greedy draws the most likely"
                f" token), got {self.generation.temperature}"
            )
        if self.generation.top_k is not None:
            check_at_least("generation.top_k", self.generation.top_k, 1)
        check_seed("generation.seed", self.generation.seed)
        check_one_of("prompts.source", self.prompts.source, ("builtin", "file"))
        if self.prompts.source == "file" and self.prompts.file is None:
            raise ConfigError("prompts=file needs prompts.file, a .txt or .jsonl file, got nothing")
        if self.prompts.limit is not None:
            check_at_least("prompts.limit", self.prompts.limit, 1)
        if self.prompts.max_tokens is not None:
            check_at_least("prompts.max_tokens", self.prompts.max_tokens, 1)
        if not STUDY_NAME.fullmatch(self.study):
            raise ConfigError(
                "study must be 1 to 100 letters, digits, dots, dashes or underscores and begin"
                f" with a letter or digit, got {self.study!r}"
            )
        if not self.runs_dir:
            raise ConfigError("runs_dir must name a folder, got an empty text")
        check_finite("reporting_tolerance", self.reporting_tolerance)
        if self.reporting_tolerance <= 0:
            raise ConfigError(
                f"reporting_tolerance must be above 0 nats, got {self.reporting_tolerance}"
            )


def check_common(device: DeviceSettings, tracking: TrackingSettings, seed: int) -> None:
    """The settings that both runners share."""
    check_one_of("device.name", device.name, DEVICES)
    check_one_of("device.dtype", device.dtype, DTYPES)
    check_one_of("tracking.mode", tracking.mode, TRACKING_MODES)
    check_seed("seed", seed)


def _feedback(feedback: FeedbackSettings) -> None:
    check_one_of("feedback.kind", feedback.kind, KINDS)
    check_finite("feedback.strength", feedback.strength)
    check_finite("feedback.hidden_strength", feedback.hidden_strength)
    if feedback.layers != "all":
        _layers("feedback.layers", feedback.layers)
    alone = feedback.kind == HIDDEN_STATE
    if alone and feedback.layers != "all":
        raise ConfigError(
            "feedback.layers must be all with feedback=hidden_state, which enriches embeddings, got"
            f" {feedback.layers!r}"
        )
    if feedback.hidden_strength != 0 and feedback.kind in (HIDDEN_STATE, FeedbackKind.NONE.value):
        raise ConfigError(
            f"feedback.hidden_strength must be 0 with feedback={feedback.kind}: it adds hidden"
            " states to a feedback of tokens, and alone they are feedback=hidden_state with"
            f" feedback.strength, got {feedback.hidden_strength}"
        )
    if feedback.shift not in (0, 1):
        raise ConfigError(f"feedback.shift must be 0 or 1, got {feedback.shift}")
    if feedback.shift == 0 and not alone and feedback.hidden_strength == 0:
        raise ConfigError("feedback.shift must be 1 where no hidden states are fed back, got 0")


def _window(recompute: RecomputeSettings) -> None:
    window = recompute.window
    if recompute.solver != "windowed":
        if window is not None:
            raise ConfigError(
                f"recompute.window needs recompute=windowed, got {window!r} with recompute=full"
            )
        return
    number = isinstance(window, int) and not isinstance(window, bool) and window >= 1
    if not number and window not in ("all", "auto"):
        raise ConfigError(
            "recompute.window must be all, auto or a whole number of at least 1 (1 reads from left"
            f" to right), got {window!r}"
        )
    if recompute.damping != 1:
        raise ConfigError(
            "recompute.damping must be 1 with recompute=windowed, as damped estimates never are"
            f" final, got {recompute.damping}"
        )


def _layers(key: str, value: Any) -> None:
    numbers = list(value) if isinstance(value, (list, tuple)) else None
    if not numbers or not all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in numbers
    ):
        raise ConfigError(
            f"{key} must be 'all' or a list of layer numbers from 0, such as [0,1], got {value!r}"
        )


def register_schemas() -> None:
    """Make the schema known to Hydra, as the first entry of the primary config's defaults."""
    ConfigStore.instance().store(name="converge_schema", node=ConvergeSettings)


know_schemas(
    ConvergeSettings,
    ModelSettings,
    FeedbackSettings,
    RecomputeSettings,
    GenerationSettings,
    PromptSettings,
    DeviceSettings,
    TrackingSettings,
)
