"""Reading files that may come from anybody: sizes are bounded, and nothing waits or runs code.

Needs no torch; every runner may use it.
"""

import errno
import io
import json
import os
import pickle
import pickletools
import stat
from pathlib import Path
from typing import Any

SETTINGS_SIZE = 2**24  # bytes; the most that is read of a file of settings
TOKENIZER_SIZE = 2**26  # bytes; the largest published ones have a tenth of it

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# what a pickled dict of texts and whole numbers is made of; none of it names or calls anything
_PLAIN_OPCODES = {
    *("PROTO", "FRAME", "MARK", "STOP", "MEMOIZE"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"),
}


def machine_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def open_regular(path: str | Path, *, most: int) -> io.BufferedReader:
    """Open a regular file of at most ``most`` bytes for reading; links to one count as one.

    Raises:
        OSError: there is none, it is a pipe, device, socket or folder, or it is larger; its
            ``strerror`` says which.
    """
    try:
        # a pipe that nobody writes to would be waited for
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a zero byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    found = os.fstat(handle)
    kind = _KINDS.get(stat.S_IFMT(found.st_mode))
    if kind is not None or found.st_size > most:
        os.close(handle)
        size = f"it has {found.st_size:,} bytes, and at most {most:,} are read"
        raise OSError(
            errno.EINVAL, size if kind is None else f"it is {kind}, not a regular file", str(path)
        )
    return open(handle, "rb")


def read_regular(path: str | Path, *, most: int) -> bytes:
    """The bytes of a regular file of at most ``most`` of them; an OSError as in open_regular."""
    with open_regular(path, most=most) as stream:
        return stream.read(most)


def parse_json(raw: bytes | str) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is not JSON, nested too deeply, or names a key twice.
    """
    try:
        return json.loads(raw, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"it names {twice[:80]!r} twice")
    return table


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError("it asks for code")


def parse_plain_pickle(raw: bytes) -> Any:
    """The content of a pickle of dicts, lists, texts and whole numbers alone.

    Raises:
        ValueError: it is damaged, or holds anything else; nothing of it has run.
    """
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if opcode.name not in _PLAIN_OPCODES:
                raise ValueError(
                    f"it holds more than dicts, lists, texts and whole numbers ({opcode.name})"
                )
            if opcode.name == "LONG_BINPUT" and (argument or 0) > count:
                raise ValueError("it asks for more memory than its content needs")
        return _PlainUnpickler(io.BytesIO(raw)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged: {error}") from None
