"""How a composed configuration becomes typed settings, and the words for what is wrong with it.

Knows no setting by name, and imports no torch.
"""

import difflib
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

LARGEST_SEED = 2**32 - 1  # numbers made from several seeds must fit into PyTorch's 64 bits
UNSET = "???"  # OmegaConf's word for a value that the user must give


class ConfigError(ValueError):
    """A setting that cannot be; the message is one sentence for the user."""


class Settings(BaseModel):
    """A group of settings: typed, frozen, without unknown keys.

    A field's ``description`` says in the sentences about it what it must be; without one, its type
    and bounds do. Raise ``ConfigError`` in a validator of the model for what fields forbid
    each other.
    """

    # a study may be called 2024
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    def plain(self) -> dict[str, Any]:
        """The settings as JSON and YAML have them."""
        return self.model_dump(mode="json")


S = TypeVar("S", bound=Settings)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Count = Annotated[Whole, Field(ge=1)]
Positive = Annotated[Number, Field(gt=0)]
Seed = Annotated[Whole, Field(ge=0, le=LARGEST_SEED)]


def to_settings(config: DictConfig, schema: type[S]) -> S:
    """The checked settings of a configuration that Hydra has composed.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, an impossible value.
    """
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from None
    settings = parse(plain, schema)
    _refuse_missing(plain, schema)
    return settings


def parse(plain: dict[str, Any], schema: type[S]) -> S:
    """The checked settings of a dictionary; what it does not name gets its default.

    Raises:
        ConfigError: as above.
    """
    try:
        return schema.model_validate(_given(plain))
    except ValidationError as error:
        raise ConfigError(_mistake(error, plain, schema)) from None


def unknown_key(full_key: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(full_key.rpartition(".")[2], allowed, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown key {full_key!r}{hint}; allowed here: {', '.join(allowed)}"


def sentence(error: BaseException, *, options: list[str] | None = None) -> str:
    """What Hydra or OmegaConf has to say, as one sentence with what is allowed.

    Args:
        options: instead of the choices that Hydra finds in the group of a missing one.
    """
    if isinstance(error, OverrideParseException):
        return f"the override {error.override!r} cannot be read: it must be key=value"
    cause = error.__cause__ or error
    key, place = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    if isinstance(place, DictConfig) and "is not in struct" in str(cause):
        return unknown_key(str(key), [str(name) for name in place if name != "hydra"])
    said = [_first_line(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        said.append(_first_line(error))
    text = ": ".join(dict.fromkeys(part for part in said if part))
    if key and key not in text:
        text = f"{key}: {text}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        text = f"{text.rstrip('.')}; allowed: {', '.join(options or sorted(error.options))}"
    return text


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _given(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    return {key: _given(value) for key, value in plain.items() if value != UNSET}


def _refuse_missing(plain: dict[str, Any], schema: type[Settings], prefix: str = "") -> None:
    for name, field in schema.model_fields.items():
        key, inner = f"{prefix}{name}", field.annotation
        if plain.get(name, UNSET) == UNSET:
            raise ConfigError(_missing(key))
        if isinstance(inner, type) and issubclass(inner, Settings):
            _refuse_missing(plain[name], inner, f"{key}.")


def _missing(key: str) -> str:
    return f"{key} must be given, for example {key}=..."


def _mistake(error: ValidationError, plain: Any, schema: type[Settings]) -> str:
    """The first mistake that pydantic found, in our words."""
    first = min(error.errors(include_url=False), key=lambda mistake: len(mistake["loc"]))
    if isinstance(said := first.get("ctx", {}).get("error"), ConfigError):
        return str(said)
    place: Any = schema
    value, names = plain, []
    for part in first["loc"]:  # what follows a field that is no group names pydantic's own types
        names.append(str(part))
        value = value.get(part) if isinstance(value, dict) else None
        field = place.model_fields.get(part)
        place = field.annotation if field is not None else None
        if not (isinstance(place, type) and issubclass(place, Settings)):
            break
        schema = place
    key = ".".join(names)
    if field is None:
        return unknown_key(key, list(schema.model_fields))
    if first["type"] == "missing":
        return _missing(key)
    got = "null" if value is None else repr(value)
    allowed = field.description or _words(field.annotation, field.metadata)
    return f"{key} must be {allowed}, got {got}"


def _words(kind: Any, limits: list[Any]) -> str:
    """What a value of a type may be, in words."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        inner = [limit for info in more for limit in getattr(info, "metadata", [info])]
        return _words(kind, [*inner, *limits])
    if get_origin(kind) is Literal:
        values = [str(value) for value in get_args(kind)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_words(one, limits) for one in get_args(kind))
    names = {int: "a whole number", float: "a finite number", str: "a text", NoneType: "null"}
    if kind is bool:
        return "true or false"
    if isinstance(kind, type) and issubclass(kind, Settings):
        return f"a group of {', '.join(kind.model_fields)}"
    return names[kind] + (_bounds(limits) if kind in (int, float) else "")


def _bounds(limits: list[Any]) -> str:
    bounds = {
        name: getattr(limit, name)
        for limit in limits
        for name in ("ge", "gt", "le")
        if hasattr(limit, name)
    }
    if {"ge", "le"} <= set(bounds):
        return f" from {bounds['ge']} to {bounds['le']}"
    words = {"ge": " of at least {}", "gt": " above {}", "le": " of at most {}"}
    return " and".join(words[name].format(value) for name, value in bounds.items())
