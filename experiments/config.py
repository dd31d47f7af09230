"""The settings of the runners: typed, checked, and with the words for what is wrong.

Each dataclass is the schema of a Hydra group. They are not frozen because OmegaConf makes a frozen
schema read-only, which would refuse the user's overrides.
"""

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.errors import OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from stateful_gpt.device import DEVICES, DTYPES
from stateful_gpt.feedback import HIDDEN_STATE, KINDS, FeedbackKind
from stateful_gpt.generate import Start

T = TypeVar("T")

STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TRACKING_MODES = ("offline", "online", "disabled")
STRATEGIES = ("greedy", "sample")
SOLVERS = ("full", "windowed")
LARGEST_SEED = 2**32 - 1  # numbers made from several seeds must fit into PyTorch's 64 bits


class ConfigError(ValueError):
    """A setting that cannot be; the message is one sentence for the user."""


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
        _one_of("recompute.solver", self.recompute.solver, SOLVERS)
        _window(self.recompute)
        if self.recompute.solver == "windowed" and self.feedback.shift == 0:
            raise ConfigError(
                "feedback.shift must be 1 with recompute=windowed, as nothing else becomes final"
                " from left to right, got 0"
            )
        _at_least("recompute.iterations", self.recompute.iterations, 1)
        _at_least("recompute.tolerance", self.recompute.tolerance, 0)
        _finite("recompute.damping", self.recompute.damping)
        if not 0 < self.recompute.damping <= 1:
            raise ConfigError(
                "recompute.damping must be above 0 and at most 1 (1 is undamped),"
                f" got {self.recompute.damping}"
            )
        _one_of("recompute.start", self.recompute.start, [start.value for start in Start])
        _one_of("generation.strategy", self.generation.strategy, STRATEGIES)
        _at_least("generation.max_new_tokens", self.generation.max_new_tokens, 0)
        _finite("generation.temperature", self.generation.temperature)
        if self.generation.temperature <= 0:
            raise ConfigError(
                "generation.temperature must be above 0 (generation=greedy draws the most likely"
                f" token), got {self.generation.temperature}"
            )
        if self.generation.top_k is not None:
            _at_least("generation.top_k", self.generation.top_k, 1)
        _seed("generation.seed", self.generation.seed)
        _one_of("prompts.source", self.prompts.source, ("builtin", "file"))
        if self.prompts.source == "file" and self.prompts.file is None:
            raise ConfigError("prompts=file needs prompts.file, a .txt or .jsonl file, got nothing")
        if self.prompts.limit is not None:
            _at_least("prompts.limit", self.prompts.limit, 1)
        if self.prompts.max_tokens is not None:
            _at_least("prompts.max_tokens", self.prompts.max_tokens, 1)
        if not STUDY_NAME.fullmatch(self.study):
            raise ConfigError(
                "study must be 1 to 100 letters, digits, dots, dashes or underscores and begin"
                f" with a letter or digit, got {self.study!r}"
            )
        if not self.runs_dir:
            raise ConfigError("runs_dir must name a folder, got an empty text")
        _finite("reporting_tolerance", self.reporting_tolerance)
        if self.reporting_tolerance <= 0:
            raise ConfigError(
                f"reporting_tolerance must be above 0 nats, got {self.reporting_tolerance}"
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
            _at_least(f"training.{name}", getattr(self.training, name), 1)
        for name in ("evaluate_depth", "evaluate_windows"):
            _at_least(f"training.{name}", getattr(self.training, name), 1)
        if self.training.final_windows is not None:
            _at_least("training.final_windows", self.training.final_windows, 1)
        _one_of("corpus.documents", self.corpus.documents, ("file", "line"))
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
            _finite(f"training.{name}", value)
            if value <= 0:
                raise ConfigError(f"training.{name} must be above 0, got {value}")
        _at_least("training.weight_decay", self.training.weight_decay, 0)
        _at_least("training.save_every_seconds", self.training.save_every_seconds, 0)
        if not 0 <= self.training.final_fraction <= 1:
            raise ConfigError(
                f"training.final_fraction must be from 0 to 1, got {self.training.final_fraction}"
            )
        _one_of("training.precision", self.training.precision, ("float32", "bfloat16"))
        _one_of("training.attention", self.training.attention, ("sdpa", "reference"))
        if self.device.dtype != "float32":
            raise ConfigError(
                "device.dtype must be float32 in training (training.precision=bfloat16 computes"
                f" in less), got {self.device.dtype!r}"
            )
        check_common(self.device, self.tracking, self.seed)


def check_common(device: DeviceSettings, tracking: TrackingSettings, seed: int) -> None:
    """The settings that both runners share."""
    _one_of("device.name", device.name, DEVICES)
    _one_of("device.dtype", device.dtype, DTYPES)
    _one_of("tracking.mode", tracking.mode, TRACKING_MODES)
    _seed("seed", seed)


def register_schemas() -> None:
    """Make the schemas known to Hydra, as the first entry of each primary config's defaults."""
    store = ConfigStore.instance()
    store.store(name="converge_schema", node=ConvergeSettings)
    store.store(name="train_schema", node=TrainSettings)


def to_settings(config: DictConfig, schema: type[T]) -> T:
    """The typed settings of a composed configuration.

    Raises:
        ConfigError: an unknown key (a ``+key=`` override gets past Hydra), a wrong type, or a
            missing value.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    _refuse_unknown(plain, schema, prefix="")
    try:
        settings = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "a setting"
        raise ConfigError(f"{key} must be given, for example {key}=...") from None
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from None
    assert isinstance(settings, schema)
    return settings


def sentence(error: BaseException) -> str:
    """What Hydra or OmegaConf has to say, as one sentence with what is allowed."""
    if isinstance(error, OverrideParseException):
        return f"the override {error.override!r} cannot be read: it must be key=value"
    said = [_first_line(error)]
    cause = error.__cause__
    while cause is not None:
        said.append(_first_line(cause))
        cause = cause.__cause__
    key = getattr(error.__cause__ or error, "full_key", None)
    unknown = re.search(r"Key '([^']*)' not in '([^']*)'", " ".join(said))
    if unknown:
        allowed = [
            f.name for schema in _SCHEMAS if schema.__name__ == unknown[2] for f in fields(schema)
        ]
        if allowed:
            return _unknown(str(key or unknown[1]), unknown[1], allowed)
    text = ": ".join(dict.fromkeys(part for part in said if part))
    if key and key not in text:
        text = f"{key}: {text}"
    options = re.search(r"Available options in '[^']*':((?:\n\t.*)+)", str(error))
    if options:
        text = f"{text.rstrip('.')}; allowed: {', '.join(options[1].split())}"
    return text


def know_schemas(*schemas: type) -> None:
    """Make the keys of more schemas known to the sentences about unknown ones."""
    _SCHEMAS.extend(schema for schema in schemas if schema not in _SCHEMAS)


_SCHEMAS: list[type] = [
    ConvergeSettings,
    TrainSettings,
    ModelSettings,
    FeedbackSettings,
    RecomputeSettings,
    GenerationSettings,
    PromptSettings,
    DeviceSettings,
    TrackingSettings,
    CorpusSettings,
    ArchitectureSettings,
    TrainingSettings,
]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _unknown(full_key: str, key: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown key {full_key!r}{hint}; allowed here: {', '.join(allowed)}"


def _refuse_unknown(plain: dict[Any, Any], schema: Any, *, prefix: str) -> None:
    known = {f.name: f for f in fields(schema)}
    for key, value in plain.items():
        if key not in known:
            raise ConfigError(_unknown(f"{prefix}{key}", str(key), list(known)))
        inner = known[key].type
        if is_dataclass(inner) and isinstance(value, dict):
            _refuse_unknown(value, inner, prefix=f"{prefix}{key}.")


def _one_of(key: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")


def _finite(key: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {value}")


def _at_least(key: str, value: float, least: float) -> None:
    _finite(key, value)
    if value < least:
        raise ConfigError(f"{key} must be at least {least}, got {value}")


def _seed(key: str, value: int) -> None:
    if not 0 <= value <= LARGEST_SEED:
        raise ConfigError(f"{key} must be from 0 to {LARGEST_SEED}, got {value}")


def _feedback(feedback: FeedbackSettings) -> None:
    _one_of("feedback.kind", feedback.kind, KINDS)
    _finite("feedback.strength", feedback.strength)
    _finite("feedback.hidden_strength", feedback.hidden_strength)
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
