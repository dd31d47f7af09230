"""Tokenizers. Each is a ``tiktoken.Encoding``: GPT-2's, single bytes, or a BPE trained on a corpus.

Nothing here needs a network: GPT-2's ranks are shipped with the package and checked by hash.
"""

import base64
import binascii
import hashlib
import json
import lzma
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path

import tiktoken

END_OF_TEXT = "<|endoftext|>"
BPE_FORMAT = "stateful_gpt.bpe/1"

# GPT-2's rule for cutting text into words before merging (possessive quantifiers, as tiktoken)
SPLIT_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


class TokenizerError(ValueError):
    """A tokenizer that cannot be had; the message is one sentence for the user."""


def load_tokenizer(name: str | Path) -> tiktoken.Encoding:
    """The tokenizer called ``gpt2`` or ``byte``, or the one in a file.

    A file is either this project's JSON (see :func:`save_bpe`) or tiktoken's own list of ranks
    (base64 bytes, a space, the rank; GPT-2's split pattern is assumed).

    Raises:
        TokenizerError: no such tokenizer or file, or not a tokenizer.
    """
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "byte":
        return byte_tokenizer()
    path = Path(name)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"tokenizer must be gpt2, byte or a readable file, got {str(name)!r}"
            f" ({error.strerror or error})"
        ) from None
    try:
        if raw.lstrip()[:1] == b"{":
            return _bpe_from_json(raw)
        return _encoding(
            path.stem, SPLIT_PATTERN, _ranks_from_lines(raw), extra_tokens=(END_OF_TEXT,)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"{path} is not a tokenizer file: {error}") from None


@cache
def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's BPE: 50,257 ids, the last of them end-of-text."""
    packed = resources.files("stateful_gpt").joinpath("assets/gpt2.tiktoken.xz").read_bytes()
    raw = lzma.decompress(packed)
    if hashlib.sha256(raw).hexdigest() != GPT2_RANKS_SHA256:
        raise TokenizerError("the shipped GPT-2 ranks are damaged: reinstall stateful_gpt")
    return _encoding("gpt2", SPLIT_PATTERN, _ranks_from_lines(raw), extra_tokens=(END_OF_TEXT,))


@cache
def byte_tokenizer() -> tiktoken.Encoding:
    """One id a byte, and 256 for end-of-text."""
    ranks = {bytes([b]): b for b in range(256)}
    return _encoding("byte", SPLIT_PATTERN, ranks, extra_tokens=(END_OF_TEXT,))


def train_bpe(texts: Iterable[str], *, vocab_size: int, name: str) -> tiktoken.Encoding:
    """Train a byte-pair encoding of ``vocab_size`` ids, end-of-text among them."""
    import rustbpe  # only training needs it

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return _encoding(name, SPLIT_PATTERN, ranks, extra_tokens=(END_OF_TEXT,))


def save_bpe(encoding: tiktoken.Encoding, path: Path) -> None:
    """Write an encoding as readable JSON that :func:`load_tokenizer` takes back."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    content = {
        "format": BPE_FORMAT,
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "ranks": [base64.b64encode(token).decode() for token, _ in ranks],
    }
    path.write_text(json.dumps(content, indent=0) + "\n")


def end_token(encoding: tiktoken.Encoding) -> int | None:
    """The id that ends a text, if the encoding has one."""
    return encoding._special_tokens.get(END_OF_TEXT)


def token_text(encoding: tiktoken.Encoding, token_id: int) -> str:
    r"""A token for people to read: bytes that are no whole character appear as ``\xe2``.

    An id outside the vocabulary (a padded model can produce one) appears as ``<id 50300>``.
    """
    try:
        raw = encoding.decode_single_token_bytes(token_id)
    except KeyError:
        return f"<id {token_id}>"
    return raw.decode("utf-8", errors="backslashreplace")


def decode(encoding: tiktoken.Encoding, token_ids: list[int]) -> str:
    """The text of some ids; ids outside the vocabulary appear as in :func:`token_text`."""
    parts = []
    for token_id in token_ids:
        try:
            parts.append(encoding.decode_single_token_bytes(token_id))
        except KeyError:
            parts.append(token_text(encoding, token_id).encode())
    return b"".join(parts).decode("utf-8", errors="replace")


def _encoding(
    name: str, pattern: str, ranks: dict[bytes, int], *, extra_tokens: tuple[str, ...]
) -> tiktoken.Encoding:
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise TokenizerError(f"the ranks lack {len(missing)} of the 256 single bytes")
    first_free = max(ranks.values()) + 1
    special = {token: first_free + i for i, token in enumerate(extra_tokens)}
    return tiktoken.Encoding(
        name=name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )


def _ranks_from_lines(raw: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for line in raw.splitlines():
        if line:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise TokenizerError(f"{line[:40]!r} is not a base64 token and its rank") from None
    lines = sum(1 for line in raw.splitlines() if line)
    if sorted(ranks.values()) != list(range(lines)):
        raise TokenizerError("its ranks are not 0, 1, 2 … with one token each")
    return ranks


def _bpe_from_json(raw: bytes) -> tiktoken.Encoding:
    content = json.loads(raw)
    if content.get("format") != BPE_FORMAT:
        raise TokenizerError(f"format must be {BPE_FORMAT!r}, got {content.get('format')!r}")
    ranks = {
        base64.b64decode(token, validate=True): rank for rank, token in enumerate(content["ranks"])
    }
    if len(ranks) != len(content["ranks"]):
        raise TokenizerError("a token stands twice in its ranks")
    special = content["special_tokens"]
    if not all(isinstance(i, int) and i >= len(ranks) for i in special.values()):
        raise TokenizerError("the ids of special tokens must follow the ranks")
    if len(set(special.values())) != len(special):
        raise TokenizerError("two special tokens share an id")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise TokenizerError(f"the ranks lack {len(missing)} of the 256 single bytes")
    try:
        return tiktoken.Encoding(
            name=str(content["name"]),
            pat_str=content["pattern"],
            mergeable_ranks=ranks,
            special_tokens=special,
        )
    except Exception as error:  # the pattern's compiler raises its own kinds
        raise TokenizerError(f"the split pattern does not compile: {error}") from None
