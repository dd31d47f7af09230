"""The texts that are studied: built in, or from the user's file."""

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from experiments.converge.settings import PromptSettings
from experiments.settings import ConfigError
from stateful_gpt.console import cut
from stateful_gpt.tokenizer import Tokenizer, TokenizerError, decode
from stateful_gpt.untrusted import PROMPTS_SIZE, CheckpointError, read_regular

BUILT_IN = Path(__file__).with_name("prompts.jsonl")


@checked(frozen=True, config=ConfigDict(strict=True))
class Prompt:
    """A text, or its ids if the file gave those."""

    id: str = ""
    text: str | None = None
    tokens: list[int] | None = None


@dataclass(frozen=True)
class EncodedPrompt:
    id: str
    text: str
    tokens: list[int]


def read_prompts(settings: PromptSettings) -> list[Prompt]:
    """The prompts asked for, in the order of their file.

    Raises:
        ConfigError: a missing, empty, binary, huge or malformed file.
    """
    path = BUILT_IN if settings.file is None else Path(settings.file)
    what = f"prompts.file {cut(repr(str(path)))}"
    try:
        # line ends stay as they are
        text = read_regular(path, most=PROMPTS_SIZE).decode("utf-8-sig")
    except CheckpointError as error:
        raise ConfigError(f"prompts.file {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} is not text: it must be UTF-8") from None
    if "\0" in text:
        raise ConfigError(f"{what} is not text: it has NUL bytes")
    if not text.strip():
        raise ConfigError(f"{what} is empty: it must hold a prompt")
    if path.name.endswith(".jsonl"):  # or that is all its name
        prompts = _from_lines(text, what)
    elif settings.split == "lines":
        # splitlines would cut at form feeds, too
        lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
        prompts = [Prompt(str(number), line) for number, line in enumerate(lines, start=1)]
    else:
        prompts = [Prompt(path.stem, text)]
    return prompts[: settings.limit]


def content_hash(prompts: list[Prompt]) -> str:
    """Identifies what the prompts say, wherever they were read from."""
    content = json.dumps([[p.id, p.text, p.tokens] for p in prompts], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def encode_prompts(
    prompts: list[Prompt],
    encoding: Tokenizer,
    *,
    max_tokens: int | None,
    block_size: int,
    vocab_size: int,
) -> list[EncodedPrompt]:
    """Tokens of every prompt, cut to ``max_tokens``.

    Raises:
        ConfigError: a prompt without tokens, longer than the block, or with characters or ids that
            tokenizer and model do not know.
    """
    encoded = []
    for prompt in prompts:
        tokens, named = prompt.tokens, f"prompt {cut(repr(prompt.id))}"
        if prompt.text is not None:
            try:
                tokens = encoding.encode_ordinary(prompt.text)
            except TokenizerError as error:
                raise ConfigError(f"{named}: {error}") from None
        tokens = (tokens or [])[:max_tokens]
        if not tokens:
            raise ConfigError(f"{named} is empty: it must have at least one token")
        if wrong := [i for i in tokens if not 0 <= i < vocab_size]:
            raise ConfigError(
                f"{named} has the token id {wrong[0]}, but the model's vocabulary"
                f" goes from 0 to {vocab_size - 1}"
            )
        if len(tokens) > block_size:
            raise ConfigError(
                f"{named} has {len(tokens)} tokens, more than the model's block of"
                f" {block_size}: set prompts.max_tokens={block_size} or less"
            )
        encoded.append(EncodedPrompt(prompt.id, decode(encoding, tokens), tokens))
    return encoded


def _from_lines(text: str, what: str) -> list[Prompt]:
    found: dict[int, Prompt] = {}  # by line
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found[number] = TypeAdapter(Prompt).validate_json(line)
        except ValidationError as error:
            raise ConfigError(f"{what}, line {number}, {_mistake(error)}") from None
    given = {prompt.id for prompt in found.values()}
    prompts: dict[str, Prompt] = {}
    for number, prompt in found.items():
        numbers = map(str, count(len(prompts) + 1))
        name = prompt.id or next(n for n in numbers if n not in given and n not in prompts)
        if (prompt.text is None) == (prompt.tokens is None):
            raise ConfigError(f"{what}, line {number}, must have either text or tokens")
        if name in prompts:
            raise ConfigError(
                f"{what}, line {number}, repeats the id {cut(repr(name))}: ids must differ"
            )
        prompts[name] = replace(prompt, id=name)
    return list(prompts.values())


def _mistake(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return f"is not a JSON object ({first['msg']})"
    key = ".".join(map(str, first["loc"]))
    return f"{key}: {first['msg'].lower()}, got {cut(repr(first['input']))}"
