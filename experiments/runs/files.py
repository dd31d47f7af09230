"""Files that are whole or absent: written beside their place, then moved into it."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stateful_gpt.console import cut
from stateful_gpt.untrusted import open_regular

if TYPE_CHECKING:
    import pyarrow as pa


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file in the same folder, which is there, then rename it."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # less the umask
    try:
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # a full disk names no file
            error.filename = error.filename or str(path)
        raise


def remove_partial(path: Path) -> None:
    """Remove what killed attempts to write ``path`` have left beside it."""
    for partial in path.parent.glob(f".{path.name}.*"):
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no whole one."""
    try:
        with open_regular(path) as stream:
            return json.loads(stream.read())
    except (OSError, ValueError, RecursionError):
        return None


def write_table(path: Path, table: "pa.Table") -> None:
    """A Parquet file."""
    import pyarrow.parquet as pq  # takes a while: only where tables are written or read

    write_atomically(path, lambda partial: pq.write_table(table, partial))


def short_hash(content: Any, length: int = 10) -> str:
    """Names what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:length]


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Of those of these files that are there: what ``changed`` compares them with later."""
    return {name: checksum(folder / name) for name in names if (folder / name).is_file()}


def changed(folder: Path, known: Any) -> str | None:
    """Which file is no longer what ``checksums`` saw, in a few words; ``known`` may be anything."""
    for name, before in known.items() if isinstance(known, dict) else ():
        try:
            if checksum(folder / Path(name).name) != before:
                return f"{cut(name)} is not as it was written"
        except (OSError, ValueError):
            return f"unreadable {cut(name)}"
    return None


def checksum(path: Path) -> str:
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
