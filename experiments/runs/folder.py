"""The folder of one run: which runs are finished, what is kept of an unfinished one.

A run is computed prompt by prompt. Each finished prompt lies in ``.prompts/`` until the last one
is done; then the files of the run are put together and ``status.json`` says ``finished``. Whoever
computes a run holds the lock of its folder, so that two processes never write the same one.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from experiments.converge.settings import ConvergeSettings
from experiments.runs.files import read_json, write_atomically, write_json, write_table

CONFIG = "config.yaml"
STATUS = "status.json"
SUMMARY = "summary.json"
TRAJECTORY = "trajectory.parquet"
ITERATIONS = "iterations.parquet"
CHANGES = "changes.patch"
TRACKER = "wandb"
_PARTS = ".prompts"
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without them say


def run_id(settings: ConvergeSettings, *, model: str, prompts: str) -> str:
    """A short hash of everything that can change a result.

    Device, output paths and tracking cannot; the model and the prompts count by their content
    (``model``, ``prompts``: hashes of it), wherever their files lie.
    """
    plain = settings.deciding()
    plain["prompts"] = {"content": prompts, "max_tokens": settings.prompts.max_tokens}
    plain["model"] = model
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


class RunFolder:
    """``<runs_dir>/<study>/<run_id>/``"""

    def __init__(self, settings: ConvergeSettings, identity: str) -> None:
        self.id = identity
        self.path = Path(settings.runs_dir) / settings.study / identity

    @property
    def finished(self) -> bool:
        status = read_json(self.path / STATUS)
        return isinstance(status, dict) and status.get("state") == "finished"

    @contextmanager
    def locked(
        self, on_wait: Callable[[], object], on_no_locks: Callable[[], object]
    ) -> Iterator[None]:
        """Hold the folder; waits while another process does. A killed holder lets go.

        On a file system without locks the folder is not held: two processes may then compute the
        same run, each into whole files.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / _LOCK
        while True:
            with lock.open("w") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    on_wait()
                    fcntl.flock(stream, fcntl.LOCK_EX)
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                    on_no_locks()
                if not _is_file_at(stream.fileno(), lock):
                    continue  # the holder before us has removed what we waited for
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return

    def begin(
        self, settings: ConvergeSettings, origin: dict[str, Any], *, changes: bytes = b""
    ) -> None:
        """Say that the run is under way, and clear away what a broken-off attempt left behind.

        ``changes``: the patch from the commit to the source that runs; empty if they agree.
        """
        shutil.rmtree(self.path / TRACKER, ignore_errors=True)
        for leftover in self.path.glob(".*.*.*"):
            if leftover.is_file():
                leftover.unlink()
        if changes:
            write_atomically(self.path / CHANGES, lambda p: p.write_bytes(changes))
        else:
            (self.path / CHANGES).unlink(missing_ok=True)
        content = OmegaConf.to_yaml(OmegaConf.create(settings.plain()))
        write_atomically(self.path / CONFIG, lambda p: p.write_text(content, encoding="utf-8"))
        self._status = {
            "state": "running",
            "run_id": self.id,
            "study": settings.study,
            "started": now(),
            "finished": None,
            "error": None,
            "process": os.getpid(),
            "host": socket.gethostname(),
            **origin,
        }
        write_json(self.path / STATUS, self._status)

    def fail(self, error: str) -> None:
        """Record why the run broke off; its finished prompts stay."""
        if self.finished:  # by another process, where there are no locks
            return
        write_json(
            self.path / STATUS,
            {**self._status, "state": "failed", "finished": now(), "error": error},
        )

    def finish(self) -> None:
        shutil.rmtree(self.path / _PARTS, ignore_errors=True)
        write_json(self.path / STATUS, {**self._status, "state": "finished", "finished": now()})

    def kept(self, number: int, prompt_id: str) -> dict[str, Any] | None:
        """The summary of a prompt that an earlier attempt has finished, or None."""
        summary = read_json(self._part(number, "json"))
        if not isinstance(summary, dict) or summary.get("prompt_id") != prompt_id:
            return None
        try:
            for name in (TRAJECTORY, ITERATIONS):
                pq.read_metadata(self._part(number, name))
        except (OSError, pa.ArrowException):
            return None  # a crash of the whole machine can leave a name without its content
        return summary

    def keep(
        self, number: int, summary: dict[str, Any], trajectory: pa.Table, iterations: pa.Table
    ) -> None:
        """Save a finished prompt. The summary comes last: with it, the prompt is whole."""
        write_table(self._part(number, TRAJECTORY), trajectory)
        write_table(self._part(number, ITERATIONS), iterations)
        write_json(self._part(number, "json"), summary)

    def assemble(self, count: int, summary: dict[str, Any]) -> None:
        """Put the files of the run together from its finished prompts."""
        for name in (TRAJECTORY, ITERATIONS):
            parts = [self._part(number, name) for number in range(count)]

            def write(path: Path, parts: list[Path] = parts) -> None:
                with pq.ParquetWriter(path, pq.read_schema(parts[0])) as writer:
                    for part in parts:
                        writer.write_table(pq.read_table(part))

            write_atomically(self.path / name, write)
        write_json(self.path / SUMMARY, summary)

    def _part(self, number: int, name: str) -> Path:
        return self.path / _PARTS / f"{number:05d}.{name}"


def is_held(folder: Path) -> bool | None:
    """Whether a living process holds the run folder; None where there are no locks to ask."""
    try:
        with (folder / _LOCK).open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def tidy(folder: Path) -> None:
    """Remove the lock of a finished run whose holder was killed before it could."""
    lock = folder / _LOCK
    try:
        with lock.open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.unlink(missing_ok=True)
    except OSError:  # there is none, or somebody holds it
        return


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def now() -> str:
    """The time as ``status.json`` says it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
