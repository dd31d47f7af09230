"""A folder of text as what a model is trained on: one stream of tokens, or a document a line.

Shapes: N windows, T tokens that are read of each.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.settings import ConfigError
from stateful_gpt.console import cut
from stateful_gpt.tokenizer import Tokenizer, end_token
from stateful_gpt.train import IGNORE
from stateful_gpt.untrusted import CORPUS_SIZE, read_regular


@dataclass(frozen=True)
class Corpus:
    """Encoded text."""

    tokens: Tensor  # (n,) ids of a stream, or (N, T + 1) of documents, IGNORE being padding
    characters: int  # of the text, a line's end included
    block_size: int  # T

    @property
    def size(self) -> int:
        """How many tokens there are, padding apart."""
        return int((self.tokens != IGNORE).sum())

    @property
    def characters_per_prediction(self) -> float:
        """What makes nats per character of nats per token."""
        return self.characters / int((self.windows()[:, 1:] != IGNORE).sum())

    def batch(self, step: int, *, size: int, seed: int) -> Tensor:
        """(size, T + 1) ids for training step ``step``: a function of seed and step alone."""
        lines = self.tokens.ndim == 2
        rows = self.tokens if lines else self.tokens.unfold(0, self.block_size + 1, 1)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return rows[torch.randint(len(rows), (size,), generator=generator)]

    def windows(self) -> Tensor:
        """(N, T + 1) ids in which every token but the first is a target exactly once."""
        if self.tokens.ndim == 2:
            return self.tokens
        count = -(-(len(self.tokens) - 1) // self.block_size)
        padded = torch.full((count * self.block_size + 1,), IGNORE)
        padded[: len(self.tokens)] = self.tokens
        return padded.unfold(0, self.block_size + 1, self.block_size)


def read_texts(key: str, folder: str) -> dict[str, str]:
    """The .txt files of a folder by name, in that order; raises ConfigError if there are none, or
    one is not text.
    """
    named = cut(repr(folder))
    paths = sorted(Path(folder).glob("*.txt")) if os.path.isdir(folder) else []
    if not paths:
        raise ConfigError(
            f"{key} must be a folder of .txt files, got {named}"
            " (scripts.prepare_corpus makes data/austen, scripts.prepare_names data/names)"
        )
    try:
        raw = {path.name: read_regular(path, most=CORPUS_SIZE) for path in paths}
        texts = {name: content.decode("utf-8-sig") for name, content in raw.items()}
        return {n: text.replace("\r\n", "\n").replace("\r", "\n") for n, text in texts.items()}
    except ValueError as error:  # no regular file, or no UTF-8
        raise ConfigError(f"{key}: a file of {named} is no text ({cut(error)})") from None


def read_corpus(
    key: str, texts: Collection[str], encoding: Tokenizer, *, block_size: int, lines: bool
) -> Corpus:
    """All texts in a row, each begun by the end-of-text token, or every line that is not empty,
    between two of them.

    Raises:
        ConfigError: of lines, if the tokenizer has no such token, none is there or one is long.
    """
    begin, end = encoding.end_tokens[:1], end_token(encoding)
    if not lines:
        ids = [i for text in texts for i in (*begin, *encoding.encode_ordinary(text))]
        return Corpus(torch.tensor(ids), sum(map(len, texts)), block_size)
    if end is None:
        raise ConfigError("corpus.documents=line needs a tokenizer with <|endoftext|>")
    # splitlines would cut at form feeds, too
    documents = [line for text in texts for line in text.split("\n") if line]
    if not documents:
        raise ConfigError(f"{key} must have a line of text to be read with corpus.documents=line")
    table = torch.full((len(documents), block_size + 1), IGNORE)
    for row, line in enumerate(documents):
        ids = [end, *encoding.encode_ordinary(line), end]
        if len(ids) > block_size + 1:
            raise ConfigError(
                f"{key}: a line of {len(ids) - 2} tokens does not fit architecture.block_size"
                f"={block_size}: it holds {block_size - 1} ({line[:40]!r})"
            )
        table[row, : len(ids)] = torch.tensor(ids)
    return Corpus(table, sum(len(line) + 1 for line in documents), block_size)
