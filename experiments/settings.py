"""How a composed configuration becomes typed settings, and the words for what is wrong with it.

Knows no setting by name, and imports no torch.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Self, TypeVar

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from stateful_gpt.console import cut

LARGEST_SEED = 2**32 - 1  # numbers made from several seeds must fit into PyTorch's 64 bits


class ConfigError(ValueError):
    """A setting that cannot be; the message is one sentence for the user."""


class Settings(BaseModel):
    """A group of settings: typed, frozen, without unknown keys.

    A field's ``description`` says in the sentences about it what it must be; without one, pydantic
    does.
    """

    # a study may be called 2024
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    def conflicts(self) -> Iterator[str]:
        """A sentence for each two fields that forbid each other."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        for sentence in self.conflicts():
            raise ConfigError(sentence)
        return self

    def plain(self) -> dict[str, Any]:
        """The settings as JSON and YAML have them."""
        return self.model_dump(mode="json")


S = TypeVar("S", bound=Settings)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_no_bool), Field(ge=-(10**18), le=10**18)]
Count = Annotated[Whole, Field(ge=1)]
Positive = Annotated[Number, Field(gt=0)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=LARGEST_SEED)]


def to_settings(config: DictConfig, schema: type[S]) -> S:
    """The checked settings of a configuration that Hydra has composed.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, an impossible value.
    """
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(_missing(str(error.full_key))) from None
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from None
    settings = parse(plain, schema)
    # a default of the schema is for stored settings: what is composed has all, less a ``~key``
    for key in _absent(settings):
        raise ConfigError(_missing(key))
    return settings


def parse(plain: dict[str, Any], schema: type[S]) -> S:
    """The same of a dictionary; what it does not name gets its default."""
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(_mistake(error, plain, schema)) from None


def _absent(settings: Settings, prefix: str = "") -> Iterator[str]:
    for name, value in settings:
        if name not in settings.model_fields_set:
            yield prefix + name
        elif isinstance(value, Settings):
            yield from _absent(value, f"{prefix}{name}.")


def unknown_key(full_key: str, allowed: list[str], *, inside: Sequence[str] = ()) -> str:
    """``inside``: keys of that name in the groups that are allowed."""
    close = inside or difflib.get_close_matches(full_key.rpartition(".")[2], allowed, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    all_allowed = ", ".join(allowed) or "any, if the setting begins with a +"
    return f"unknown key {cut(repr(full_key))}{hint}; allowed here: {all_allowed}"


def sentence(error: BaseException, *, options: list[str] | None = None) -> str:
    """What Hydra or OmegaConf has to say, as one sentence; ``options`` are what is allowed, if that
    is other than what Hydra finds in the group.
    """
    if isinstance(error, OverrideParseException):
        said = "it must be key=value, in quotes where a value has odd characters: 'key=\"value\"'"
        return f"the override {cut(repr(error.override))} cannot be read: {said}"
    cause = error.__cause__ or error
    key, place = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    if isinstance(place, DictConfig) and "is not in struct" in str(cause):
        names = [str(name) for name in place if name != "hydra"]
        groups = [name for name in names if isinstance(place[name], DictConfig)]
        inside = [f"{name}.{key}" for name in groups if key in place[name]]
        return unknown_key(str(key), names, inside=inside)
    chain = [error]
    while (deeper := chain[-1].__cause__) is not None:
        chain.append(deeper)
    lines = [str(each).strip().partition("\n")[0] or type(each).__name__ for each in chain]
    text = ": ".join(map(cut, dict.fromkeys(lines)))
    if text.startswith("Ambiguous value"):
        text += ": -m sweeps over several values, [a,b] is one list"
    if key and key not in text:
        text = f"{cut(key)}: {text}"
    if isinstance(last := chain[-1], MissingConfigException) and last.options is not None:
        text = f"{text.rstrip('.')}; allowed: {', '.join(options or sorted(last.options))}"
    return text


def _missing(key: str) -> str:
    return f"{key} must be given, for example {key}=..."


def _mistake(error: ValidationError, plain: Any, schema: type[Settings]) -> str:
    """The first mistake that pydantic found, in one sentence."""
    mistakes = error.errors(include_url=False)
    first = min(mistakes, key=lambda mistake: len(mistake["loc"]))
    if isinstance(said := first.get("ctx", {}).get("error"), ConfigError):
        return str(said)
    value, names, group = plain, [], schema
    for part in map(str, first["loc"]):
        names.append(part)
        if part not in group.model_fields:
            return unknown_key(".".join(names), list(group.model_fields))
        field = group.model_fields[part]
        value = value.get(part) if isinstance(value, dict) else None
        kind: Any = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, Settings)):
            break  # what follows names pydantic's own types
        group = kind
    key = ".".join(names)
    if first["type"] == "missing":
        return _missing(key)
    # of several types that a value may have, each says what it takes
    ours = [m["msg"] for m in mistakes if list(map(str, m["loc"]))[: len(names)] == names]
    takes = [re.sub(r"^(Input should be|Value error,) |, (unable|got) .*", "", m) for m in ours]
    allowed = field.description or " or ".join(dict.fromkeys(takes))
    if first["type"] == "model_type":
        allowed = f"a group of settings ({', '.join(group.model_fields)})"
    return f"{key} must be {allowed}, got {'null' if value is None else cut(repr(value))}"
