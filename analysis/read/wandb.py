"""Reads W&B runs: from the folder kept on disk, from its log alone, and from a server.

A run of this project keeps a copy of its run folder among the files of its W&B run, which reads
like the run itself. Where that copy is missing or damaged, the history still gives the measures
over all prompts. From a server (`wandb:ENTITY/PROJECT[/GROUP]`) the copies are fetched once into a
cache, `$STATEFUL_GPT_CACHE` or `~/.cache/stateful_gpt`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.read import run_folder
from analysis.read.saved import (
    ALL_PROMPTS,
    MEASURES,
    PROMPT_COLUMNS,
    Found,
    LeftOut,
    NotData,
    SavedRun,
    SourceError,
)
from analysis.read.wandb_log import Log, NotALog, read_log

PREFIX = "wandb:"
COPY = "run_folder"
FILES = tuple(f"{COPY}/{name}" for name in run_folder.MARKS)
PAGE = 100  # runs a request
MOST_ROWS = 100_000  # of a history; W&B samples where there are more
AT_ONCE = 8
PATIENCE: dict[str, Any] = {  # a server that is down is said to be so within half a minute
    "x_graphql_retry_max": 2,
    "x_graphql_retry_wait_min_seconds": 0.5,
    "x_graphql_retry_wait_max_seconds": 2.0,
    "x_graphql_timeout_seconds": 20.0,
    "x_file_transfer_retry_max": 3,
    "x_file_transfer_retry_wait_max_seconds": 2.0,
    "x_file_transfer_timeout_seconds": 120.0,
}
LOCAL_COPY = Path("files", COPY)
HISTORY_COLUMNS = ("iteration", *MEASURES)
MOST_ITERATIONS = 2**31


def accepts_folder(folder: Path) -> bool:
    """Whether a W&B run lies in this very folder."""
    return next(folder.glob("*.wandb"), None) is not None


def read_folder(folder: Path, *, log: Path | None = None) -> SavedRun:
    """One W&B run. Raises NotData where even the log holds no measures, or those of a failure."""
    try:
        return run_folder.read_run(folder / LOCAL_COPY)
    except NotData as reason:
        problem = str(reason)
    path = log or min(folder.glob("*.wandb"))
    try:
        said = read_log(path)
    except NotALog as reason:
        raise NotData(str(reason)) from None
    if said.run_id is None:
        raise NotData("its W&B log breaks off before the run begins")
    if said.exit_code:
        raise NotData("failed")
    return _from_history(
        run_id=said.run_id,
        study=said.group,
        place=str(folder.resolve()),
        config=said.config,
        summary=said.summary,
        history=said.history,
        lacking=_lacking(said, problem if (folder / LOCAL_COPY).exists() else f"no {LOCAL_COPY}"),
    )


def _lacking(said: Log, problem: str) -> str:
    if said.exit_code is None:
        return f"{problem}, and its W&B log breaks off"
    return problem


def accepts_address(source: str) -> bool:
    return source.startswith(PREFIX)


def read_address(source: str) -> Found:
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
        tuple(one for one in read_runs if isinstance(one, SavedRun)),
        tuple(one for one in read_runs if isinstance(one, LeftOut)),
    )


def _read_run(run: Any, *, place: str) -> SavedRun:
    """A run of W&B's public API. Raises NotData if it holds no measures or is not finished."""
    if run.state != "finished":
        raise NotData(str(run.state))
    try:
        return run_folder.read_run(_fetch(run) / COPY)
    except NotData as reason:
        problem = str(reason)
    return _from_history(
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
        return _read_run(run, place=place)
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


def _from_history(
    *,
    run_id: str,
    study: str,
    place: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    lacking: str,
    commit: str | None = None,
) -> SavedRun:
    """As much of a run as its history tells. Raises NotData where there is no row to tell it."""
    frame = pd.DataFrame([{name: row.get(name) for name in HISTORY_COLUMNS} for row in history])
    frame = frame.reindex(columns=list(HISTORY_COLUMNS)).apply(_numbers)
    frame = frame[frame["iteration"].between(1, MOST_ITERATIONS)]
    if frame.empty:
        raise NotData(f"{lacking}, and no history of iterations")
    # a run that was resumed logs again what it had logged before
    frame = frame.drop_duplicates("iteration", keep="last").sort_values("iteration")
    ended = "outcome" in summary  # until then, W&B's summary repeats the last row of the history
    overall = {key: summary[key] for key in PROMPT_COLUMNS if ended and _is_plain(summary.get(key))}
    tolerance = config.get("reporting_tolerance")
    told = {"reporting_tolerance": tolerance if _is_plain(tolerance) else None, **overall}
    return SavedRun(
        run_id=run_id,
        study=str(config.get("study") or study or "unknown"),
        place=place,
        config={key: value for key, value in config.items() if not key.startswith("_")},
        status={"commit": commit},
        summary={
            "run_id": run_id,
            "overall": overall,
            "prompts": [{**told, "prompt_id": ALL_PROMPTS}],
        },
        iterations=frame.astype({"iteration": int}).assign(prompt_id=ALL_PROMPTS, step=0),
        trajectory=None,
        lacking=lacking,
    )


def _numbers(column: pd.Series) -> pd.Series:
    """Anything that is no number is missing: a log may hold what it likes."""
    return pd.Series(
        [value if isinstance(value, int | float) else None for value in column], dtype=float
    )


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)
