"""Reads the log that W&B keeps of a run on disk, `run-ID.wandb`, as far as it is whole.

The file is a log of LevelDB's form: a header of 7 bytes, then blocks of 32 KiB of chunks, each with
a crc32 (4 bytes), a length (2) and a type (1). Joined, the chunks are protobuf records. A killed
run leaves a torn tail, and a chunk that does not agree with its checksum ends the reading too.
Nothing in the file is executed. Knows nothing of what the runs of this project record.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b":W&B"
FILE_HEADER = 7
CHUNK_HEADER = 7
BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class NotALog(Exception):
    """The file is not a W&B log, or cannot be read; the text says why in a few words."""


@dataclass
class Log:
    """What a run told W&B. Values are what JSON has for them; a metric by its dotted name."""

    run_id: str | None = None  # None: the log broke off before the run had introduced itself
    project: str = ""
    group: str = ""
    started: str | None = None  # UTC, ISO 8601
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None  # None: the run never said that it ended


def read_log(path: Path) -> Log:
    """Everything up to the first damage. Raises NotALog."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    log = Log()
    try:
        with path.open("rb") as file:
            for record in _records(file):
                _note(log, record)
    except DecodeError:
        pass  # the checksum was right and the content is not: what came before it stands
    except OSError as error:
        raise NotALog(f"{path.name} cannot be read ({error.strerror})") from None
    return log


def _records(file: BinaryIO) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2 as messages  # takes a second: only where used

    header = file.read(FILE_HEADER)
    if header[: len(MAGIC)] != MAGIC:
        raise NotALog("the file is no W&B log")
    parts: list[bytes] = []
    for kind, content in _chunks(file):
        if kind in (FULL, FIRST):
            parts = []
        elif not parts:
            return  # the beginning of this record is missing
        parts.append(content)
        if kind in (FULL, LAST):
            yield messages.Record.FromString(b"".join(parts))  # type: ignore[attr-defined]
            parts = []


def _chunks(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Chunks up to the first that is torn, damaged or not there."""
    room = BLOCK - FILE_HEADER  # the first block begins with the header of the file
    while True:
        block = file.read(room)
        at = 0
        while len(block) - at >= CHUNK_HEADER:
            length, kind = int.from_bytes(block[at + 4 : at + 6], "little"), block[at + 6]
            content = block[at + CHUNK_HEADER : at + CHUNK_HEADER + length]
            checksum = int.from_bytes(block[at : at + 4], "little")
            if len(content) < length or zlib.crc32(content, zlib.crc32(bytes([kind]))) != checksum:
                return
            if kind not in (FULL, FIRST, MIDDLE, LAST):
                return
            yield kind, content
            at += CHUNK_HEADER + length
        if len(block) < room:
            return
        room = BLOCK


def _note(log: Log, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run = record.run
        log.run_id, log.project, log.group = run.run_id, run.project, run.run_group
        if run.HasField("start_time"):
            log.started = run.start_time.ToJsonString()
        _update(log.config, run.config)
    elif kind == "config":
        _update(log.config, record.config)
    elif kind == "summary":
        _update(log.summary, record.summary)
    elif kind == "history":
        log.history.append({name: value for _, name, value in _values(record.history.item)})
    elif kind == "exit":
        log.exit_code = record.exit.exit_code


def _update(mapping: dict[str, Any], changes: Any) -> None:
    """Applies a record of a configuration or summary: keys may be nested."""
    for keys, _, value in _values(changes.update):
        inner = mapping
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                break
        else:
            inner[keys[-1]] = value
    for item in changes.remove:
        keys = tuple(item.nested_key) or (item.key,)
        inner = mapping
        for key in keys[:-1]:
            inner = inner.get(key, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            inner.pop(keys[-1], None)


def _values(items: Iterable[Any]) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Keys, dotted name and value of each item; one that is not JSON is left out."""
    for item in items:
        keys = tuple(item.nested_key) or (item.key,)
        try:
            yield keys, ".".join(keys), json.loads(item.value_json)
        except (ValueError, RecursionError):
            continue
