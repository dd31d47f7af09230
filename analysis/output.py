"""Writes a file whole or not at all. Knows nothing of what is in it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from analysis.read.saved import SourceError


def make_folder(folder: Path) -> None:
    """Raises SourceError, in a sentence, if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror or error}.") from error


def write_whole(path: Path, content: bytes) -> None:
    """Replaces `path` in one move. Raises SourceError, in a sentence, if it cannot be written."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise SourceError(f"{path} cannot be written: {error.strerror or error}.") from error
