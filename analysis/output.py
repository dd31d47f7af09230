"""Writes a file whole or not at all. Knows nothing of what is in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from analysis.read.saved import SourceError


def make_folder(folder: Path) -> None:
    """Raises SourceError, in a sentence, if it cannot be."""
    with _in_a_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Replaces `path` in one move. Raises SourceError, in a sentence, if it cannot be written."""
    make_folder(path.parent)
    with (
        _in_a_sentence(path),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".part") as folder,
    ):
        temporary = Path(folder, "content")
        temporary.write_bytes(content)
        os.replace(temporary, path)


@contextmanager
def _in_a_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror or error}.") from error
