"""The tokenizer of a Hugging Face model, with the face of a ``tiktoken.Encoding``.

Knows nothing of transformers: it takes the fast tokenizer that lies below one of theirs.
"""

import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer:
    """What this project asks of a tokenizer.

    Attributes:
        name: shown in tables and messages.
        n_vocab: one more than the largest id; there may be holes below it.
        start_tokens: what the model was trained to see before every text, mostly none or one.
        end_tokens: every id that ends a text.
    """

    def __init__(self, backend: Any, *, name: str, end_tokens: Sequence[int]) -> None:
        """Take over a ``tokenizers.Tokenizer``."""
        backend.encode_special_tokens = True  # one that is spelled out in a text is text
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._added: dict[int, bytes] = {
            token_id: token.content.encode()
            for token_id, token in backend.get_added_tokens_decoder().items()
        }
        decoder = str(backend.decoder)
        self._byte_level, self._spaced = "ByteLevel" in decoder, "▁" in decoder
        self.name = name
        self.n_vocab = max(backend.get_vocab().values()) + 1
        self.start_tokens = self._start()
        self.end_tokens = tuple(end_tokens)

    def _start(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text."""
        alone = self._backend.encode("a", add_special_tokens=False).ids
        ids = self._backend.encode("a", add_special_tokens=True).ids
        for at in range(len(ids)):
            if ids[at : at + len(alone)] == alone:
                return tuple(ids[:at])
        return ()

    @property
    def used(self) -> list[int]:
        """The ids that :meth:`encode_ordinary` can produce."""
        added = {
            i for i, token in self._backend.get_added_tokens_decoder().items() if token.special
        }
        ids = set(self._backend.get_vocab().values()) - added
        return sorted(ids | set(self.start_tokens))

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text behind the start token, if the model was trained with one."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [*self.start_tokens, *ids]

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of one id.

        Raises:
            KeyError: there is no such id.
        """
        if token in self._added:
            return self._added[token]
        text = self._backend.id_to_token(token) if 0 <= token < self.n_vocab else None
        if text is None:
            raise KeyError(token)
        if self._byte_level and all(character in _BYTES for character in text):
            return bytes(_BYTES[character] for character in text)
        if self._spaced:
            if byte := _BYTE.fullmatch(text):
                return bytes([int(byte[1], 16)])
            text = text.replace("▁", " ")
        return str(text).encode()


def _byte_characters() -> dict[str, int]:
    """The bytes that the characters of a byte-level vocabulary stand for, as GPT-2 has them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(rest)
    }


_BYTES = _byte_characters()
