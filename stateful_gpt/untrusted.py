"""Reading files that may come from anybody: sizes are bounded, and nothing waits or runs code.

Needs no torch; every runner may use it.
"""

import io
import json
import os
import pickle
import pickletools
import stat
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from stateful_gpt.console import cut

# bytes; the most that is read of a file (of a model: what the machine has memory for)
SETTINGS_SIZE = 2**24
TOKENIZER_SIZE = 2**26  # the largest published ones have half of it
PROMPTS_SIZE = 2**26  # far more than any model's block holds
CORPUS_SIZE = 2**34

MEMBERSHIP = "/proc/self/cgroup"
CONTROL_GROUPS = Path("/sys/fs/cgroup")

# what a pickled dict of texts and whole numbers is made of; none of it names or calls anything
_PLAIN_OPCODES = {
    *("PROTO", "FRAME", "MARK", "STOP", "MEMOIZE"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"),
}


class CheckpointError(ValueError):
    """A model, or a part of one, that cannot be loaded; the message is one sentence."""


@lru_cache(maxsize=1)  # to ask takes longer than to read a small file
def machine_memory() -> int:
    """Bytes of memory that this process may use: all, or what its control groups allow."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):  # not Linux
        for line in Path(MEMBERSHIP).read_text().splitlines():
            number, controllers, group = line.split(":", 2)
            if number != "0" and "memory" not in controllers.split(","):
                continue
            # version 2 has one tree of groups, version 1 one for each controller
            old = ("memory", "memory.limit_in_bytes")
            tree, name = ("", "memory.max") if number == "0" else old
            place = CONTROL_GROUPS / tree / group.strip("/")
            for folder in (place, *place.parents):
                with suppress(OSError, ValueError):  # a group without a limit says max
                    limits.append(int((folder / name).read_text()))
    return min(limits)


def require_memory(needed: int, said: str) -> None:
    """Raises CheckpointError where the machine has no memory for so many bytes."""
    if needed > (memory := machine_memory()):
        raise CheckpointError(f"{said} {needed:,} bytes of memory, and the machine has {memory:,}")


def require_copy(model: Any) -> None:
    """Raises MemoryError where no copy in float64 fits; what is mapped from a file can make way."""
    weights = [w for w in model.parameters() if w.is_cpu]
    own = sum(w.nbytes for w in weights if w.untyped_storage().resizable())  # not mapped
    if own + 8 * sum(w.numel() for w in weights) > machine_memory():
        raise MemoryError  # or Linux would end the process


def open_regular(path: str | Path, *, most: int | None = None) -> io.BufferedReader:
    """Open a file of at most ``most`` bytes, by default as many as the machine has memory.

    Anything but a regular file is refused: pipes, devices, sockets, folders.
    """
    most = machine_memory() if most is None else most
    try:
        # a pipe that nobody writes to would be waited for
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{cut(path)} cannot be read: {reason}") from None
    found = os.fstat(handle)
    problem = "it is not a regular file"
    if stat.S_ISREG(found.st_mode):
        if found.st_size <= most:
            return open(handle, "rb")
        problem = f"it has {found.st_size:,} bytes, and at most {most:,} are read"
    os.close(handle)
    raise CheckpointError(f"{cut(path)} cannot be read: {problem}")


def read_regular(path: str | Path, *, most: int) -> bytes:
    """The bytes of a file of at most ``most`` of them, opened as by ``open_regular``."""
    with open_regular(path, most=most) as stream:
        # no more is set aside than the file has
        return stream.read(os.fstat(stream.fileno()).st_size)


def parse_json(raw: bytes) -> dict[str, Any]:
    """The table that a JSON text is; ValueError of what is none, or names a key twice."""
    try:
        content = json.loads(raw, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a table")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"it names {cut(repr(name))} twice")
        table[name] = value
    return table


def parse_plain_pickle(raw: bytes) -> Any:
    """The content of a pickle of dicts, lists, texts and whole numbers; ValueError of any other."""
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if opcode.name not in _PLAIN_OPCODES:
                raise ValueError(
                    f"it holds more than dicts, lists, texts and whole numbers ({opcode.name})"
                )
            if opcode.name == "LONG_BINPUT" and (argument or 0) > count:
                raise ValueError("it asks for more memory than its content needs")
        return pickle.loads(raw)
    except (pickle.UnpicklingError, EOFError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged: {error}") from None
