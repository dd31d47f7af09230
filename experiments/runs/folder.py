"""The folder of one run: whether it is finished, and what is kept of one that is not.

A run is computed batch by batch. Each finished batch lies in ``.prompts/`` until the last one is
done; then the files of the run are put together and ``status.json`` says ``finished``. Knows
nothing of what is computed.
"""

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf

from experiments.runs import files
from experiments.runs.lock import LOCK, is_held
from stateful_gpt.console import cut
from stateful_gpt.untrusted import SETTINGS_SIZE, open_regular, read_regular

if TYPE_CHECKING:
    import pyarrow as pa

CONFIG = "config.yaml"
STATUS = "status.json"
SUMMARY = "summary.json"
TRAJECTORY = "trajectory.parquet"
ITERATIONS = "iterations.parquet"
ACCURACY = "accuracy.parquet"  # of state tracking
CHANGES = "changes.patch"
TRACEBACK = "traceback.txt"
TRACKER = "wandb"
# the tables of a finished run, and columns without which nobody can read them
TABLES = {
    TRAJECTORY: ("prompt_id", "step", "iteration", "position", "token", "log_prob"),
    ITERATIONS: ("prompt_id", "step", "iteration"),
}
TABLES_OF_CONTEST = {ACCURACY: ("depth", "level", "accuracy")}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PARTS = ".prompts"
# of a part's origin, how it can differ from a run's
_OTHER = {
    "commit": "another commit",
    "device": "another device",
    "threads": "other threads",
    "changes": "other uncommitted changes",
}


class RunFolder:
    """``<runs_dir>/<study>/<run_id>/`` of the run with this configuration."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self._status: dict[str, Any] = {}
        self._parts: list[int] = []  # the first prompt of each batch that is kept

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def called_finished(self) -> bool:
        """Whether its status says so, whatever its files hold."""
        return read_status(self.path).get("state") == "finished"

    def tidy(self) -> None:
        """Clear away what a kill behind the end of a finished run has left."""
        shutil.rmtree(self.path / _PARTS, ignore_errors=True)
        if is_held(self.path) is False:
            with suppress(OSError):  # where nothing can be written, nothing has to go
                (self.path / LOCK).unlink()

    def begin(self, origin: dict[str, Any], *, changes: bytes = b"") -> None:
        """Say that the run is under way, and clear away what a broken-off attempt left behind.

        Args:
            origin: what ``status.json`` says of where the results come from.
            changes: the patch from the commit to the source that runs; empty if they agree.
        """
        shutil.rmtree(self.path / TRACKER, ignore_errors=True)
        if (parts := self.path / _PARTS).is_symlink() or parts.is_file():
            parts.unlink()
        for leftover in (*self.path.glob(".*.*.*"), self.path / TRACEBACK, self.path / CHANGES):
            if leftover.is_file():
                leftover.unlink()
        if changes:
            files.write_atomically(self.path / CHANGES, lambda path: path.write_bytes(changes))
        files.write_text(self.path / CONFIG, OmegaConf.to_yaml(self.config))
        self._parts = []
        self._status = {
            "state": "running",
            "run_id": self.id,
            "study": self.config.get("study"),
            "started": now(),
            "finished": None,
            "error": None,
            "process": os.getpid(),
            "host": socket.gethostname(),
            **origin,
            "kept": [],
        }
        files.write_json(self.path / STATUS, self._status)

    def fail(self, error: str, *, traceback: str | None = None) -> str:
        """Record why the run broke off, and return that; its finished prompts stay."""
        if traceback is not None:
            files.write_text(self.path / TRACEBACK, traceback)
            error = f"{error} (see {self.path / TRACEBACK})"
        if not self.called_finished:  # by another process, where there are no locks
            self._end("failed", error)
        return error

    def refuse(self, error: str, *, traceback: str | None = None) -> None:
        """Record why the run could not begin, or again why its last attempt broke off; raises
        BlockingIOError if somebody else computes it, whose end is what counts.
        """
        if is_held(self.path):
            raise BlockingIOError(f"{self.path} is being computed")
        self.path.mkdir(parents=True, exist_ok=True)
        self._status = {"started": None} | read_status(self.path)
        self.fail(error, traceback=traceback)

    def finish(self) -> None:
        try:
            self._end("finished", None)
        except OSError:  # a tracker has filled the disk: what is put together already makes room
            shutil.rmtree(self.path / _PARTS, ignore_errors=True)
            self._end("finished", None)
        shutil.rmtree(self.path / _PARTS, ignore_errors=True)

    def _end(self, state: str, error: str | None) -> None:
        ended = {"state": state, "error": error, "finished": now()}
        files.write_json(self.path / STATUS, self._status | ended)

    def kept(self, first: int, schemas: "Sequence[pa.Schema]") -> list[dict[str, Any]] | None:
        """The summaries of the batch from prompt number ``first`` on, if an earlier attempt has
        finished it; None also if it is damaged, of another run, or of a version whose trajectory
        and iterations have other columns than ``schemas``.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        part = files.read_json(self._part(first, "json"))
        try:
            if part.pop("checksum") != self._checksum(first, part):  # some early versions had none
                return None
            if [pq.read_schema(self._part(first, name)) for name in TABLES] != list(schemas):
                return None
            summaries: list[dict[str, Any]] = part["prompts"]
            found = part["origin"]  # whose device said the threads, too, in early versions
            origin = origin_of_part({**found, "changes": {"sha256": found.get("changes")}})
            origins = [{"prompt_id": s["prompt_id"], "origin": origin} for s in summaries]
        except (AttributeError, LookupError, TypeError, ValueError, OSError, pa.ArrowException):
            return None  # a crash of the whole machine can leave a name without its content
        self._status["kept"] += origins
        self._parts.append(first)
        return summaries

    def keep(
        self,
        first: int,
        summaries: list[dict[str, Any]],
        trajectory: "pa.Table",
        iterations: "pa.Table",
    ) -> None:
        """Save a finished batch. The summaries come last: with them, it is whole."""
        for name in (*TABLES, "json"):
            if self._part(first, name).is_dir():  # no file could take its place
                shutil.rmtree(self._part(first, name))
        (self.path / _PARTS).mkdir(exist_ok=True)
        files.write_table(self._part(first, TRAJECTORY), trajectory)
        files.write_table(self._part(first, ITERATIONS), iterations)
        part = {"prompts": summaries, "origin": origin_of_part(self._status)}
        part["checksum"] = self._checksum(first, part)
        files.write_json(self._part(first, "json"), part)
        self._parts.append(first)

    def assemble(self) -> None:
        """Put the tables together from the batches that are kept, in their order; warns if some of
        them have another origin than this attempt.
        """
        import pyarrow.parquet as pq

        self._status["batches"] = len(self._parts)
        for name in TABLES:
            parts = [self._part(first, name) for first in sorted(self._parts)]

            def write(path: Path, parts: list[Path] = parts) -> None:
                with pq.ParquetWriter(path, pq.read_schema(parts[0])) as writer:
                    for part in parts:
                        writer.write_table(pq.read_table(part))

            files.write_atomically(self.path / name, write)
        ours = origin_of_part(self._status)
        if others := [kept["origin"] for kept in self._status["kept"] if kept["origin"] != ours]:
            said = f"{self.path}: {len(others)} of its prompts were computed by an earlier attempt"
            said += f" with {unlike(ours, others)}; {STATUS} says which"
            print(f"warning: {said}", file=sys.stderr)

    def summarize(self, summary: dict[str, Any]) -> None:
        """Write the summary, the last file of a run, and the checksums of all into its status."""
        files.write_json(self.path / SUMMARY, summary)
        names = (CONFIG, SUMMARY, *TABLES, ACCURACY)
        self._status["checksums"] = files.checksums(self.path, names)
        files.write_json(self.path / STATUS, self._status)

    def _checksum(self, first: int, part: dict[str, Any]) -> str:
        """Of a batch as a part of this run."""
        digests = [files.checksum(self._part(first, name)) for name in TABLES]
        return files.short_hash([self.id, first, part, digests], 64)

    def _part(self, number: int, name: str) -> Path:
        return self.path / _PARTS / f"{number:05d}.{name}"


def damage(folder: Path) -> str | None:
    """What is not whole of a finished run, in a few words: as the tables of ``analysis`` see it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    config, summary = read_config(folder), files.read_json(folder / SUMMARY)
    known = read_status(folder).get("checksums")
    if config is None:
        return f"unreadable {CONFIG}"
    contest = "contestant" in config
    if not isinstance(summary, dict) or not (contest or isinstance(summary.get("prompts"), list)):
        return f"unreadable {SUMMARY}"
    for name, columns in (TABLES_OF_CONTEST if contest else TABLES).items():
        try:
            with open_regular(folder / name) as stream, pq.ParquetFile(stream) as file:
                found = file.schema_arrow.names
                if known is None:  # of an early version: as far as what is packed can tell
                    for _ in file.iter_batches():
                        pass
        except (OSError, ValueError, pa.ArrowException):
            return f"{'unreadable' if (folder / name).exists() else 'no'} {name}"
        if missing := [column for column in columns if column not in found]:
            return f"{name} has no column {', '.join(missing)}"
    return files.changed(folder, known)


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any] | None:
    """The settings of a run; None where there is nothing to read."""
    try:
        content = yaml.load(read_regular(folder / name, most=SETTINGS_SIZE), Loader=_LOADER)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def read_status(folder: Path) -> dict[str, Any]:
    """What a run says of itself; empty where there is nothing to read."""
    status = files.read_json(folder / STATUS)
    return status if isinstance(status, dict) else {}


def run_id(folder: Path) -> str:
    """The id of a run, which is the name of its folder until somebody copies or renames that."""
    return cut(read_status(folder).get("run_id") or folder.resolve().name)


def origin_of_part(status: dict[str, Any]) -> dict[str, Any]:
    """What of a run's origin can make one of its parts unlike another."""
    origin = {name: status.get(name) for name in ("commit", "device", "threads")}
    # of a CPU the device says the threads, too, which count by themselves
    origin["device"] = str(origin["device"]).removesuffix(f", {origin['threads']} threads")
    return {**origin, "changes": changes_of(status)}


def unlike(ours: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """In what the origins of other parts differ from that of ours, in words."""
    names = [name for name in ours if any(other.get(name) != ours[name] for other in others)]
    return ", ".join(map(_OTHER.__getitem__, names))


def changes_of(status: dict[str, Any]) -> str | None:
    """The checksum of what the source held beyond its commit; new files that are no source leave an
    empty patch, and change nothing.
    """
    changes = status.get("changes") or {}
    return None if changes.get("bytes") == 0 else changes.get("sha256")


def now() -> str:
    """The time as ``status.json`` says it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
