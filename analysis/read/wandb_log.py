"""Reads the log that W&B keeps of a run on disk, `run-ID.wandb`, as far as it is whole.

The file is a log of LevelDB's form: a header of 7 bytes, then blocks of 32 KiB of chunks, each with
a crc32 (4 bytes), a length (2) and a type (1). Joined, the chunks are protobuf records. A killed
run leaves a torn tail, and a chunk that does not agree with its checksum ends the reading too.
Nothing in the file is executed. Knows nothing of what the runs of this project record.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.read.saved import NotData

MAGIC = b":W&B"
FILE_HEADER = 7
CHUNK_HEADER = 7
BLOCK = 32 * 1024
FULL, FIRST, LAST = 1, 2, 4  # a chunk in the middle is of type 3


@dataclass
class Log:
    """What a run told W&B. Values are what JSON has for them; a metric by its dotted name."""

    run_id: str | None = None  # None: the log broke off before the run had introduced itself
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None  # None: the run never said that it ended


def read_log(path: Path) -> Log:
    """Everything up to the first damage. Raises NotData."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto import wandb_internal_pb2 as messages  # takes a second: only where used

    if not path.is_file():
        raise NotData(f"{path.name} is no regular file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotData(f"{path.name} cannot be read ({error.strerror})") from None
    if not content.startswith(MAGIC):
        raise NotData("the file is no W&B log")
    log = Log()
    with suppress(DecodeError):  # the checksum is right, the content not: what came before stands
        for record in _records(content):
            _note(log, messages.Record.FromString(record))  # type: ignore[attr-defined]
    return log


def _records(content: bytes) -> Iterator[bytes]:
    """Records up to the first chunk that is torn, damaged or not there."""
    at = FILE_HEADER
    parts: list[bytes] = []
    while len(content) - at >= CHUNK_HEADER:
        checksum, length, kind = struct.unpack_from("<IHB", content, at)
        chunk = content[at + CHUNK_HEADER - 1 : at + CHUNK_HEADER + length]  # from its type on
        if len(chunk) <= length or zlib.crc32(chunk) != checksum:
            return
        if kind in (FULL, FIRST):
            parts = []
        elif not parts:
            return  # the beginning of this record is missing
        parts.append(chunk[1:])
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []
        at += CHUNK_HEADER + length
        room = BLOCK - at % BLOCK
        at += room if room < CHUNK_HEADER else 0


def _note(log: Log, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        log.run_id, log.group = record.run.run_id, record.run.run_group
        _update(log.config, record.run.config)
    elif kind == "config":
        _update(log.config, record.config)
    elif kind == "summary":
        _update(log.summary, record.summary)
    elif kind == "history":
        log.history.append({".".join(keys): v for keys, v in _values(record.history.item)})
    elif kind == "exit":
        log.exit_code = record.exit.exit_code


def _update(mapping: dict[str, Any], changes: Any) -> None:
    """Applies a record of a configuration or summary: keys may be nested."""
    for keys, value in _values(changes.update):
        inner = mapping
        for key in keys[:-1]:
            if not isinstance(inner.get(key), dict):
                inner[key] = {}
            inner = inner[key]
        inner[keys[-1]] = value


def _values(items: Iterable[Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Keys and value of each item; one that is not JSON is left out."""
    for item in items:
        try:
            yield tuple(item.nested_key) or (item.key,), json.loads(item.value_json)
        except (ValueError, RecursionError):
            continue
