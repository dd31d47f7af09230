"""Reads W&B runs: from the folder kept on disk, from its log alone, and from a server.

A run of this project keeps a copy of its run folder among the files of its W&B run, which reads
like the run itself. Where that copy is missing or damaged, the history still gives the measures
over all prompts. From a server (`wandb:ENTITY/PROJECT[/GROUP]`) the copies are fetched once into a
cache, `$STATEFUL_GPT_CACHE` or `~/.cache/stateful_gpt`.
"""

import hashlib
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.read import run_folder
from analysis.read.saved import (
    ALL_PROMPTS,
    MEASURES,
    PROMPT_COLUMNS,
    LeftOut,
    NotData,
    SavedRun,
    SourceError,
)
from analysis.read.wandb_log import Log, read_log

PREFIX = "wandb:"
COPY = "run_folder"
FILES = [f"{COPY}/{name}" for name in run_folder.MARKS]
PAGE = 100  # runs a request
MOST_ROWS = 100_000  # of a history; W&B samples where there are more
AT_ONCE = 8
PATIENCE: dict[str, Any] = {  # a server that is down is said to be so within half a minute
    "x_graphql_retry_max": 2,
    "x_graphql_retry_wait_min_seconds": 0.5,
    "x_graphql_retry_wait_max_seconds": 2.0,
    "x_graphql_timeout_seconds": 20.0,
    "x_file_transfer_retry_max": 3,
    "x_file_transfer_timeout_seconds": 120.0,
}
MOST_ITERATIONS = 2**31


def read_log_file(path: Path) -> SavedRun:
    """The W&B run of this log. Raises NotData where it holds no measures, or those of a failure."""
    copy = path.parent / "files" / COPY
    try:
        return run_folder.read_run(copy)
    except NotData as reason:
        lacking = str(reason) if copy.exists() else f"no files/{COPY}"
    log = read_log(path)
    if log.run_id is None:
        raise NotData("its W&B log breaks off before the run begins")
    if log.exit_code:
        raise NotData("failed")
    if log.exit_code is None:
        lacking += ", and its W&B log breaks off"
    return _from_history(log, place=str(path.parent.resolve()), lacking=lacking)


def read_address(source: str) -> list[SavedRun | LeftOut]:
    """Every run of a project or group. SourceError if the server does not give them."""
    parts = source.removeprefix(PREFIX).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise SourceError(f"{source}: give wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/GROUP.")
    os.environ.setdefault("WANDB_SILENT", "true")
    stdin = sys.stdin
    try:
        with open(os.devnull, encoding="utf-8") as nobody, ThreadPoolExecutor(AT_ONCE) as pool:
            sys.stdin = nobody  # W&B is to ask nobody for a key
            import wandb  # takes a second: only where it is used

            wandb.setup(settings=wandb.Settings(**PATIENCE))
            runs = wandb.Api(timeout=30, overrides={"entity": parts[0], "project": parts[1]}).runs(
                "/".join(parts[:2]),
                filters={"group": parts[2]} if len(parts) == 3 else {},
                per_page=PAGE,
                lazy=False,  # with the configuration and the summary
            )
            found = list(pool.map(_read_run, runs))
    except Exception as error:  # W&B raises many kinds
        said = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{source}: W&B says: {said[:300].rstrip('.')}.") from error
    finally:
        sys.stdin = stdin
    if not found:
        raise SourceError(f"{source}: there is no run in it.")
    return found


def _read_run(run: Any) -> SavedRun | LeftOut:
    """A run of W&B's public API, which is data if it is finished and holds measures."""
    place = f"{PREFIX}{'/'.join(run.path)}"
    if run.state != "finished":
        return LeftOut(run.id, place, str(run.state))
    try:
        return run_folder.read_run(_fetch(run) / COPY)
    except NotData as reason:
        lacking = str(reason)
    history = run.history(samples=MOST_ROWS, pandas=False)
    log = Log(run.id, run.group or "", run.config, dict(run.summary), history)
    try:
        return _from_history(log, place=place, lacking=lacking, commit=run.commit)
    except NotData as reason:
        return LeftOut(run.id, place, str(reason))


def _fetch(run: Any) -> Path:
    """The folder that holds the run's files, each fetched once and whole. Raises NotData."""
    files = {file.name: file for file in run.files(names=FILES) if file.name in FILES}
    absent = [name for name in FILES if name not in files]
    if absent:
        raise NotData(f"no {absent[0] if files else COPY} among its files")
    content = [(name, files[name].md5, files[name].size) for name in FILES]
    key = repr((os.environ.get("WANDB_BASE_URL"), run.path, content))  # new files, new place
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "stateful_gpt")
    cache = Path(os.environ.get("STATEFUL_GPT_CACHE") or usual, "wandb")
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    lost = [name for name in FILES if not (folder / name).is_file()]
    if not lost:
        return folder
    (folder / COPY).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as part:
        for name in lost:
            files[name].download(root=part, replace=True).close()
            size = Path(part, name).stat().st_size
            if size != files[name].size:
                raise NotData(f"{name} is {size} bytes instead of {files[name].size}")
        for name in lost:
            os.replace(Path(part, name), folder / name)
    return folder


def _from_history(log: Log, *, place: str, lacking: str, commit: str | None = None) -> SavedRun:
    """As much of a run as its history tells. Raises NotData where there is no row to tell it."""
    frame = pd.DataFrame(log.history).reindex(columns=["iteration", *MEASURES])
    # a log may hold what it likes
    frame = frame.apply(pd.to_numeric, errors="coerce").astype(float)
    frame = frame[frame["iteration"].between(1, MOST_ITERATIONS)]
    if frame.empty:
        raise NotData(f"{lacking}, and no history of iterations")
    # a number that does not grow begins another batch or step, or is logged again: the last counts
    begins = frame["iteration"].diff() <= 0
    frame = frame[begins.cumsum() == begins.sum()]
    ended = "outcome" in log.summary  # until then, it repeats the last row of the history
    overall = {key: log.summary[key] for key in PROMPT_COLUMNS if ended and key in log.summary}
    tolerance = {"reporting_tolerance": log.config.get("reporting_tolerance")}
    prompts = [{**tolerance, **overall, "prompt_id": ALL_PROMPTS}]
    return SavedRun(
        run_id=str(log.run_id),
        study=str(log.config.get("study") or log.group or "unknown"),
        place=place,
        config=log.config,
        status={"commit": commit},
        summary={"overall": overall, "prompts": prompts},
        iterations=frame.astype({"iteration": int}).assign(prompt_id=ALL_PROMPTS, step=0),
        trajectory=None,
        lacking=lacking,
    )
