"""Printing what others wrote, to streams that may not take it. Needs no torch."""

import atexit
import errno
import gc
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

# C0 but tab and line feed, C1, marks that turn the reading direction, line separators, surrogates
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Text that no terminal obeys: control characters and the like appear as ``\x1b``."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def cut(value: object, most: int = 200) -> str:
    """A value for an error sentence: one printable line; what is left out of it is counted."""
    text = " ".join(printable(str(value)).split())
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def exhausted(error: BaseException) -> str | None:
    """Whose memory an error says is at its end; None if it says something else."""
    if type(error).__name__ == "OutOfMemoryError":  # of torch
        return "the device's memory"
    host = isinstance(error, MemoryError) or "allocate memory" in str(error)
    return "the machine's memory" if host else None


def as_text(text: str) -> str:
    """What came as an argument or by stdin, where the locale could not read its UTF-8.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise ValueError("the text is not UTF-8") from None


class SteadyStream:
    """A stream that printing to never fails, whatever its encoding and whoever has left.

    Control characters appear as ``\\x1b`` unless it is ``verbatim``, and characters that it cannot
    express as ``\\u2603``. What the first failed write met is ``lost``; the rest goes nowhere, so
    that a computation can go on to complete its files.
    """

    def __init__(self, stream: TextIO | None, *, verbatim: bool = False) -> None:
        self.lost: OSError | None = None
        self.verbatim = verbatim
        if stream is None:  # closed before the process began
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the process's life)
            self.lost = OSError(errno.EBADF, "it is closed")
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        # what begins with it is a progress bar, which is drawn over what stands there
        parts = text.split("\r") if text.startswith("\r") else [text]
        shown = text if self.verbatim else "\r".join(map(printable, parts))
        self._try(lambda: self.stream.write(shown))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.lost = self.lost or error
            # or Python would try the rest again at exit, and complain
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_command(
    name: str, body: Callable[[], int], *, verbatim: bool = False, too_large: str = "this"
) -> int:
    """The exit code of a command whose standard streams are steady while it runs.

    1 where it succeeded but not all it printed could be written; a reader that has gone away, as
    ``head`` does, had all it wanted. ``verbatim`` leaves standard output as it is where that is not
    a terminal; ``too_large`` is what memory may not hold.
    """
    # half a second of every command was the search for cycles in what torch's import makes
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    before = sys.stdout, sys.stderr
    verbatim = verbatim and not (sys.stdout is not None and sys.stdout.isatty())
    out, err = SteadyStream(sys.stdout, verbatim=verbatim), SteadyStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        try:
            code = body()
        except SystemExit as stop:  # as argparse does, or with a sentence
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=err)
        except KeyboardInterrupt:
            print("\ninterrupted", file=err)  # behind what a command streams
            code = 130
        except (MemoryError, RuntimeError) as error:
            if (whose := exhausted(error)) is None:
                raise
            print(f"{name}: {whose} does not hold {too_large}", file=err)
            code = 1
        out.flush()
        if out.lost is not None and not isinstance(out.lost, BrokenPipeError):
            print(f"{name}: standard output is lost: {out.lost.strerror}", file=err)
            code = code or 1
        return code
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
