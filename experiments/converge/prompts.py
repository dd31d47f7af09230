"""The texts that are studied: built in, or from the user's file."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.converge.settings import PromptSettings
from experiments.settings import ConfigError
from stateful_gpt.tokenizer import Tokenizer, decode

LARGEST_FILE = 64 * 1024 * 1024  # bytes; far more than any model's block holds


@dataclass(frozen=True)
class Prompt:
    """A text, or its ids if the file gave those."""

    id: str
    text: str | None
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
    if settings.file is not None:
        prompts = _from_file(Path(settings.file), by_line=settings.split == "lines")
    else:
        path = Path(__file__).with_name("prompts.jsonl")
        prompts = _from_lines(path.read_text(encoding="utf-8"), path.name)
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
        ConfigError: a prompt without tokens, with ids that the model does not know, or longer
            than its block.
    """
    encoded = []
    for prompt in prompts:
        tokens = prompt.tokens
        if tokens is None:
            tokens = encoding.encode_ordinary(prompt.text or "")
        tokens = tokens[:max_tokens]
        if not tokens:
            raise ConfigError(f"prompt {prompt.id!r} is empty: it must have at least one token")
        wrong = [i for i in tokens if not 0 <= i < vocab_size]
        if wrong:
            raise ConfigError(
                f"prompt {prompt.id!r} has the token id {wrong[0]}, but the model's vocabulary"
                f" goes from 0 to {vocab_size - 1}"
            )
        if len(tokens) > block_size:
            raise ConfigError(
                f"prompt {prompt.id!r} has {len(tokens)} tokens, more than the model's block of"
                f" {block_size}: set prompts.max_tokens={block_size} or less"
            )
        encoded.append(EncodedPrompt(prompt.id, decode(encoding, tokens), tokens))
    return encoded


def _from_file(path: Path, *, by_line: bool) -> list[Prompt]:
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"prompts.file must end in .txt or .jsonl, got {str(path)!r}")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(
                f"prompts.file {str(path)!r} has {path.stat().st_size:,} bytes; at most"
                f" {LARGEST_FILE:,} are read"
            )
        text = path.read_bytes().decode("utf-8")  # line ends stay as they are
    except OSError as error:
        raise ConfigError(
            f"prompts.file {str(path)!r} cannot be read: {error.strerror or error}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"prompts.file {str(path)!r} is not text: it must be UTF-8") from None
    if "\0" in text:
        raise ConfigError(f"prompts.file {str(path)!r} is not text: it has NUL bytes")
    if not text.strip():
        raise ConfigError(f"prompts.file {str(path)!r} is empty: it must hold a prompt")
    if path.suffix == ".txt" and by_line:
        lines = [line for line in text.splitlines() if line.strip()]
        return [Prompt(id=str(number), text=line) for number, line in enumerate(lines, start=1)]
    if path.suffix == ".txt":
        return [Prompt(id=path.stem, text=text)]
    return _from_lines(text, str(path))


def _from_lines(text: str, name: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        prompt_id: Any = entry.get("id", str(len(prompts) + 1)) if isinstance(entry, dict) else None
        mistake = _mistake(entry, prompt_id)
        if mistake is None and prompt_id in seen:
            mistake = f"repeats the id {prompt_id!r}: ids must differ"
        if mistake is not None:
            raise ConfigError(f"prompts.file {name!r}, line {number}, {mistake}")
        seen.add(prompt_id)
        prompts.append(Prompt(prompt_id, entry.get("text"), entry.get("tokens")))
    return prompts


def _mistake(entry: Any, prompt_id: Any) -> str | None:
    """What is wrong with a line."""
    if not isinstance(entry, dict):
        return "is not a JSON object"
    # JSON can hold half a surrogate pair, and no file of ours can
    if not isinstance(prompt_id, str) or not prompt_id or re.search("[\ud800-\udfff]", prompt_id):
        return f"must have an id that is a text, got {prompt_id!r}"
    if ("text" in entry) == ("tokens" in entry):
        return "must have either text or tokens"
    if not isinstance(entry.get("text", ""), str):
        return f"must have a text in quotes, got {entry['text']!r}"
    tokens = entry.get("tokens", [])
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        return "must have tokens that are a list of whole numbers"
    return None
