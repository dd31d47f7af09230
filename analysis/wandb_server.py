"""Reads runs from a W&B server: `wandb:ENTITY/PROJECT`, or `wandb:ENTITY/PROJECT/GROUP`.

A run of this project uploads its run folder among the files of its W&B run. These files are
fetched once into a cache, `$STATEFUL_GPT_CACHE` or `~/.cache/stateful_gpt`. Of a run without them,
the history still gives the measures over all prompts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from analysis import run_folder
from analysis.history import from_history
from analysis.saved import Found, LeftOut, NotData, SavedRun, SourceError

PREFIX = "wandb:"
COPY = "run_folder"
FILES = tuple(f"{COPY}/{name}" for name in run_folder.MARKS)
PAGE = 100  # runs a request
MOST_ROWS = 100_000  # of a history; W&B samples where there are more
AT_ONCE = 8
PATIENCE = {  # a server that is down is said to be so within half a minute
    "x_graphql_retry_max": 2,
    "x_graphql_retry_wait_min_seconds": 0.5,
    "x_graphql_retry_wait_max_seconds": 2.0,
    "x_graphql_timeout_seconds": 20.0,
    "x_file_transfer_retry_max": 3,
    "x_file_transfer_retry_wait_max_seconds": 2.0,
    "x_file_transfer_timeout_seconds": 120.0,
}


def accepts(source: str) -> bool:
    return source.startswith(PREFIX)


def read(source: str) -> Found:
    """Every finished run of a project or group. SourceError if the server does not give them."""
    entity, project, group = _address(source)
    with _wandb_said(source):
        listed = list(
            _connect(entity, project).runs(
                f"{entity}/{project}",
                filters={"group": group} if group else {},
                per_page=PAGE,
                lazy=False,  # with the configuration and the summary
            )
        )
        with ThreadPoolExecutor(AT_ONCE) as pool:
            read_runs = list(pool.map(lambda run: _read_or_leave_out(run, source), listed))
    if not listed:
        raise SourceError(f"{source}: there is no run in it.")
    return Found(
        runs=tuple(one for one in read_runs if isinstance(one, SavedRun)),
        left_out=tuple(one for one in read_runs if isinstance(one, LeftOut)),
    )


def read_run(run: Any, *, place: str) -> SavedRun:
    """A run of W&B's public API. Raises NotData if it holds no measures or is not finished."""
    if run.state != "finished":
        raise NotData(str(run.state))
    try:
        return run_folder.read_run(_fetch(run) / COPY)
    except NotData as reason:
        problem = str(reason)
    return from_history(
        run_id=run.id,
        study=run.group or "",
        place=place,
        config=run.config,
        summary=dict(run.summary),
        history=run.history(samples=MOST_ROWS, pandas=False),
        lacking=problem,
        commit=run.commit,
    )


def _read_or_leave_out(run: Any, source: str) -> SavedRun | LeftOut:
    place = f"{PREFIX}{'/'.join(run.path)}"
    try:
        return read_run(run, place=place)
    except NotData as reason:
        return LeftOut(run_id=run.id, place=place, reason=str(reason))


def _fetch(run: Any) -> Path:
    """The folder that holds the run's files, fetched whole or not at all. Raises NotData."""
    files = {file.name: file for file in run.files(names=list(FILES)) if file.name in FILES}
    lacking = [name for name in FILES if name not in files]
    if lacking:
        raise NotData(f"no {lacking[0] if len(lacking) < len(FILES) else COPY} among its files")
    content = [(name, files[name].md5, files[name].size) for name in FILES]
    key = repr((os.environ.get("WANDB_BASE_URL"), run.path, content))  # new files, new place
    folder = _cache() / hashlib.sha256(key.encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder.parent))
    try:
        for name, file in files.items():
            file.download(root=str(partial), replace=True).close()
            size = (partial / name).stat().st_size
            if size != file.size:
                raise NotData(f"{name} is {size} bytes instead of {file.size}")
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # another process may have been quicker
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _cache() -> Path:
    named = os.environ.get("STATEFUL_GPT_CACHE")
    if named:
        return Path(named) / "wandb"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "stateful_gpt" / "wandb"


def _address(source: str) -> tuple[str, str, str | None]:
    parts = source.removeprefix(PREFIX).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise SourceError(f"{source}: give wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/GROUP.")
    return parts[0], parts[1], parts[2] if len(parts) == 3 else None


def _connect(entity: str, project: str) -> Any:
    """The one way in: W&B's own client, with the user's login."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb  # takes a second: only where it is used

    wandb.setup(settings=wandb.Settings(**PATIENCE))
    return wandb.Api(timeout=30, overrides={"entity": entity, "project": project})


@contextmanager
def _wandb_said(source: str) -> Iterator[None]:
    """Whatever W&B has to complain about becomes one sentence, and it asks nobody for a key."""
    stdin = sys.stdin
    try:
        with open(os.devnull, encoding="utf-8") as nobody:
            sys.stdin = nobody
            yield
    except SourceError:
        raise
    except Exception as error:  # W&B raises many kinds
        said = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{source}: W&B says: {said[:300].rstrip('.')}.") from error
    finally:
        sys.stdin = stdin
