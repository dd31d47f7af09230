"""How a composed configuration becomes typed settings, and the words for what is wrong with it.

Knows no setting by name.
"""

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

T = TypeVar("T")

LARGEST_SEED = 2**32 - 1  # numbers made from several seeds must fit into PyTorch's 64 bits

_SCHEMAS: list[type] = []


class ConfigError(ValueError):
    """A setting that cannot be; the message is one sentence for the user."""


def know_schemas(*schemas: type) -> None:
    """Make the keys of more schemas known to the sentences about unknown ones."""
    _SCHEMAS.extend(schema for schema in schemas if schema not in _SCHEMAS)


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


def check_one_of(key: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")


def check_finite(key: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {value}")


def check_at_least(key: str, value: float, least: float) -> None:
    check_finite(key, value)
    if value < least:
        raise ConfigError(f"{key} must be at least {least}, got {value}")


def check_seed(key: str, value: int) -> None:
    if not 0 <= value <= LARGEST_SEED:
        raise ConfigError(f"{key} must be from 0 to {LARGEST_SEED}, got {value}")
