"""Tokenizers: GPT-2's, single bytes, a BPE trained on a corpus, or nanoGPT's of characters.

Nothing here needs a network: GPT-2's ranks are shipped with the package and checked by hash. Files
are untrusted; whatever is wrong with one is a :class:`TokenizerError` of one sentence.
"""

import base64
import hashlib
import json
import lzma
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import tiktoken

from stateful_gpt.console import cut
from stateful_gpt.untrusted import (
    TOKENIZER_SIZE,
    CheckpointError,
    parse_json,
    parse_plain_pickle,
    read_regular,
)

END_OF_TEXT = "<|endoftext|>"
BPE_FORMAT = "stateful_gpt.bpe/1"
CHARACTERS_FORMAT = "stateful_gpt.characters/1"

# GPT-2's rule for cutting text into words before merging (possessive quantifiers, as tiktoken)
SPLIT_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
# of transformers: the names that a tokenizer's own files may have
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
# and what states other words, a start or an end for it
STATING_FILES = (*TOKENIZER_FILES, "added_tokens.json", "special_tokens_*.json", "*config.json")
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


class TokenizerError(CheckpointError):
    """A tokenizer that cannot be had, or a text that it has no ids for, in one sentence."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer; ``tiktoken.Encoding`` has the same names."""

    name: str
    n_vocab: int  # ids are from 0 to this, exclusive
    end_tokens: tuple[int, ...]  # the ids that end a text; none where nothing does

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text; a spelled-out end token is text like any other."""
        ...

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The UTF-8 of an id, which may be a part of a character; KeyError outside n_vocab."""
        ...


class BytePairs:
    """A byte-pair encoding with GPT-2's rule for words.

    ``ranks`` are of each token's bytes, from 0 without a gap, all 256 single bytes among them; with
    ``ends``, the id behind them ends a text.
    """

    def __init__(self, name: str, ranks: dict[bytes, int], *, ends: bool) -> None:
        missing = sum(bytes([b]) not in ranks for b in range(256))
        if missing:
            raise TokenizerError(f"the ranks lack {missing} of the 256 single bytes")
        self.name, self.ranks = name, ranks
        self.end_tokens: tuple[int, ...] = (len(ranks),) if ends else ()
        self.n_vocab = len(ranks) + ends
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: len(ranks)} if ends else {},
        )

    def encode_ordinary(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:  # on a million spaces in a row
            if type(error).__name__ != "PanicException":  # tiktoken's, which has no other name
                raise
            raise TokenizerError(f"tiktoken cannot encode the text: {cut(error)}") from None

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token)


class Characters:
    """nanoGPT's character-level encoding: one id for each character that its corpus had."""

    end_tokens: tuple[int, ...] = ()

    def __init__(self, name: str, characters: list[str]) -> None:
        self.name, self.characters = name, characters
        self.n_vocab = len(characters)
        self._ids = {character: i for i, character in enumerate(characters)}

    def encode_ordinary(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            unknown: str = error.args[0]
            raise TokenizerError(
                f"the character {shown(unknown)} at position {text.index(unknown)} is none of the"
                f" {self.n_vocab} characters of {self.name}"
            ) from None

    def decode_single_token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.n_vocab:
            raise KeyError(token)
        return self.characters[token].encode()


def shown(character: str) -> str:
    """For an error sentence, in quotes."""
    return repr(character) if character.isprintable() else ascii(character)


def load_tokenizer(name: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer called ``gpt2`` or ``byte``, or the one in a file.

    A file is this project's JSON (see :func:`save_tokenizer`), tiktoken's own list of ranks (base64
    bytes, a space, the rank; GPT-2's rule for words is assumed) or nanoGPT's ``meta.pkl``. ``byte``
    has no end token for a model of 256 ids (``vocab_size``).

    Raises:
        TokenizerError: no such tokenizer or file, or not a tokenizer.
    """
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "byte":
        return byte_tokenizer(ends=vocab_size != 256)
    try:
        raw = read_regular(name, most=TOKENIZER_SIZE)
    except CheckpointError as error:
        raise TokenizerError(f"tokenizer must be gpt2, byte or a readable file: {error}") from None
    path = Path(name)
    try:
        if raw[:1] == b"\x80":
            return Characters(str(path), _characters_of(parse_plain_pickle(raw)["stoi"]))
        if raw.lstrip()[:1] == b"{":
            content = parse_json(raw)
            if content.get("format") == CHARACTERS_FORMAT:
                ids = {character: i for i, character in enumerate(content["characters"])}
                return Characters(str(path), _characters_of(ids))
            return _bpe_from_json(content)
        return BytePairs(path.stem, _ranks_from_lines(raw), ends=True)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise TokenizerError(f"{path} is not a tokenizer file: {lacks}{cut(error)}") from None


@cache
def gpt2_tokenizer() -> BytePairs:
    """GPT-2's BPE: 50,257 ids, the last of them end-of-text."""
    packed = resources.files("stateful_gpt").joinpath("assets/gpt2.tiktoken.xz").read_bytes()
    raw = lzma.decompress(packed)
    if hashlib.sha256(raw).hexdigest() != GPT2_RANKS_SHA256:
        raise TokenizerError("the shipped GPT-2 ranks are damaged: reinstall stateful_gpt")
    return BytePairs("gpt2", _ranks_from_lines(raw), ends=True)


def has_other_words(folder: Path) -> bool:
    """Whether a folder of transformers states other words than GPT-2's, another start or end."""
    files = (file for pattern in STATING_FILES for file in folder.glob(pattern))
    some = {"Ġthe": 262, "Ġgazed": 50255}
    try:
        said = {file.name: parse_json(read_regular(file, most=TOKENIZER_SIZE)) for file in files}
        whole, beside = said.get("tokenizer.json", {}), said.get("tokenizer_config.json", {})
        beside |= said.get("special_tokens_map.json", {})  # where old versions name a padding
        words = (said.get("vocab.json", some), whole["model"]["vocab"] if whole else some)
        listed = [*beside.get("added_tokens_decoder", {}).values(), *whole.get("added_tokens", ())]
        added = {word["content"] for word in listed}.union(said.get("added_tokens.json", ()))
        stated = [beside.get(key) for key in ("eos_token", "pad_token")]
        end, padding = (one["content"] if isinstance(one, dict) else one for one in stated)
        ends = [end, *(one.get("eos_token_id") for one in said.values())]
        first, last = (whole.get(key) or {} for key in ("pre_tokenizer", "post_processor"))
        return bool(
            not all(some.items() <= ids.items() for ids in words)
            or added - {END_OF_TEXT, padding}  # others may be drawn, special or not
            or any(one not in (None, 50256, [50256], END_OF_TEXT) for one in ends)
            or any(one.get("add_prefix_space") for one in (beside, first))
            or any((beside.get("add_bos_token"), last.get("special_tokens")))
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return True


@cache
def byte_tokenizer(*, ends: bool = True) -> BytePairs:
    """One id a byte, and 256 for end-of-text if there is one."""
    return BytePairs("byte", {bytes([b]): b for b in range(256)}, ends=ends)


def train_bpe(texts: Iterable[str], *, vocab_size: int, name: str) -> BytePairs:
    """Train a byte-pair encoding of ``vocab_size`` ids, end-of-text among them."""
    import rustbpe  # only training needs it

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return BytePairs(name, ranks, ends=True)


def save_tokenizer(encoding: BytePairs | Characters, path: Path) -> None:
    """Write an encoding as readable JSON that :func:`load_tokenizer` takes back."""
    content: dict[str, Any]
    if isinstance(encoding, Characters):
        content = {"format": CHARACTERS_FORMAT, "characters": encoding.characters}
    else:
        end = end_token(encoding)
        ranked = sorted(encoding.ranks, key=lambda token: encoding.ranks[token])
        content = {
            "format": BPE_FORMAT,
            "name": encoding.name,
            "pattern": SPLIT_PATTERN,
            "special_tokens": {} if end is None else {END_OF_TEXT: end},
            "ranks": [base64.b64encode(token).decode() for token in ranked],
        }
    path.write_text(json.dumps(content, indent=0) + "\n")


def token_text(encoding: Tokenizer, token_id: int) -> str:
    r"""A token for people to read: bytes that are no whole character appear as ``\xe2``.

    An id outside the vocabulary (a padded model can produce one) appears as ``<id 50300>``.
    """
    return token_bytes(encoding, token_id).decode("utf-8", errors="backslashreplace")


def token_bytes(encoding: Tokenizer, token_id: int) -> bytes:
    """The UTF-8 of an id, or ``<id 50300>`` for one outside the vocabulary."""
    try:
        return encoding.decode_single_token_bytes(token_id)
    except KeyError:
        return f"<id {token_id}>".encode()


def decode(encoding: Tokenizer, token_ids: Iterable[int]) -> str:
    """The text of some ids; ids outside the vocabulary appear as in :func:`token_text`."""
    return b"".join(token_bytes(encoding, i) for i in token_ids).decode("utf-8", errors="replace")


def end_token(encoding: Tokenizer) -> int | None:
    """The id that ends a text, if there is one; the first of several."""
    return next(iter(encoding.end_tokens), None)


def _ranks(tokens: Iterable[str | bytes]) -> dict[bytes, int]:
    """Of base64 in the order of rank."""
    decoded = [base64.b64decode(token, validate=True) for token in tokens]
    ranks = {token: rank for rank, token in enumerate(decoded)}
    if len(ranks) != len(decoded):
        raise TokenizerError("a token stands twice in its ranks")
    return ranks


def _ranks_from_lines(raw: bytes) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in raw.splitlines() if line]
        pairs = sorted((int(rank), token) for token, rank in lines)
    except ValueError:
        raise TokenizerError("its lines are not a base64 token and its rank each") from None
    if [rank for rank, _ in pairs] != list(range(len(pairs))):
        raise TokenizerError("its ranks are not 0, 1, 2 … with one token each")
    return _ranks(token for _, token in pairs)


def _bpe_from_json(content: dict[str, Any]) -> BytePairs:
    if content.get("format") != BPE_FORMAT:
        raise TokenizerError(f"format must be {BPE_FORMAT!r}, got {cut(content.get('format'))}")
    name, special, ranks = content["name"], content["special_tokens"], _ranks(content["ranks"])
    if content["pattern"] != SPLIT_PATTERN:  # any other may take for ever, or match nothing
        raise TokenizerError("its pattern is not the one that this project writes")
    if special not in ({}, {END_OF_TEXT: len(ranks)}) or not isinstance(name, str):
        raise TokenizerError(
            f"it must have a name, and as special tokens none or {END_OF_TEXT} with the id"
            f" {len(ranks)}"
        )
    return BytePairs(cut(name), ranks, ends=bool(special))


def _characters_of(ids: dict[str, int]) -> list[str]:
    """Characters in the order of their ids, as ``stoi`` of nanoGPT's meta.pkl has them."""
    for character, i in ids.items():
        if type(character) is not str or len(character) != 1 or type(i) is not int:
            other = cut(repr(character))
            raise TokenizerError(f"it gives ids to other things than characters: {other}")
        character.encode()  # half a character is none
    if not ids or sorted(ids.values()) != list(range(len(ids))):
        raise TokenizerError("the ids of its characters are not 0, 1, 2 … with one character each")
    return sorted(ids, key=lambda character: ids[character])
