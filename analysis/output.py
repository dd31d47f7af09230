"""What a command gives out: files whole or not at all, and lines to any terminal or to none."""

import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from analysis.read.saved import SourceError
from analysis.text import printable


def make_folder(folder: Path) -> None:
    """Raises SourceError, in a sentence, if it cannot be."""
    with _in_a_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Replaces `path` in one move. Raises SourceError, in a sentence, if it cannot be written."""
    make_folder(path.parent)
    real = Path(os.path.realpath(path))  # a link stays one
    if os.path.exists(real) and not os.path.isfile(real):  # /dev/null is to stay what it is
        raise SourceError(f"{path} cannot be written: it is no regular file.")
    with (
        _in_a_sentence(path),
        tempfile.TemporaryDirectory(dir=real.parent, prefix=".", suffix=".part") as folder,
    ):
        temporary = Path(folder, "content")
        temporary.write_bytes(content)
        os.replace(temporary, real)


@contextmanager
def _in_a_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror or error}.") from error


class SteadyStream:
    """A stream that printing to never fails, so that a command completes its files.

    What could steer a terminal is spelt out, and so is what its encoding lacks, as ``\\u2603``.
    `lost` is what the first failed write met; after it, the rest goes nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.lost = OSError(errno.EBADF, "it is closed") if stream is None else None
        # for the process's life; where standard output was, no result may lie
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(printable(text, keep="\n")))
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


def with_steady_streams(command: Callable[[], int]) -> int:
    """The command's exit code: 1 where it succeeded but not all it printed could be written.

    A reader that has gone away, as ``head`` does, had all it wanted.
    """
    out: Any = SteadyStream(sys.stdout)
    err: Any = SteadyStream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = command()
        except SystemExit as stop:  # of argparse
            code = int(stop.code or 0)
        except KeyboardInterrupt:
            print("interrupted", file=err)
            code = 130
        except MemoryError:
            print("analysis: the machine's memory does not hold this", file=err)
            code = 1
        out.flush()
        if out.lost is not None and not isinstance(out.lost, BrokenPipeError):
            print(f"analysis: standard output is lost: {out.lost.strerror}", file=err)
            code = code or 1
        err.flush()
    return code
