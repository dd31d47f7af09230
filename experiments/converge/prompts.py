"""The texts that are studied: built in, or from the user's file."""

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

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
        raw = (
            resources.files("experiments.converge")
            .joinpath("prompts.jsonl")
            .read_text(encoding="utf-8")
        )
        prompts = _from_lines(raw, "prompts.jsonl")
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
        if prompt.tokens is not None:
            tokens = prompt.tokens
        else:
            assert prompt.text is not None
            tokens = encoding.encode_ordinary(prompt.text)
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


def _encodes(text: str) -> bool:
    """False of half a surrogate pair, which JSON can hold and no file of ours can."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _from_lines(text: str, name: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"prompts.file {name!r}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigError(f"{where}, is not a JSON object") from None
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}, is not a JSON object")
        prompt_id = entry.get("id", str(len(prompts) + 1))
        has_text, has_tokens = "text" in entry, "tokens" in entry
        if not isinstance(prompt_id, str) or not prompt_id or not _encodes(prompt_id):
            raise ConfigError(f"{where}, must have an id that is a text, got {prompt_id!r}")
        if prompt_id in seen:
            raise ConfigError(f"{where}, repeats the id {prompt_id!r}: ids must differ")
        if has_text == has_tokens:
            raise ConfigError(f"{where}, must have either text or tokens")
        if has_text and not isinstance(entry["text"], str):
            raise ConfigError(f"{where}, must have a text in quotes, got {entry['text']!r}")
        if has_tokens and not (
            isinstance(entry["tokens"], list)
            and all(isinstance(i, int) and not isinstance(i, bool) for i in entry["tokens"])
        ):
            raise ConfigError(f"{where}, must have tokens that are a list of whole numbers")
        seen.add(prompt_id)
        prompts.append(Prompt(prompt_id, entry.get("text"), entry.get("tokens")))
    return prompts
