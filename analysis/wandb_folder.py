"""Reads the folder that W&B keeps of a run on disk: `offline-run-*`, or the `.wandb` file in it.

A run of this project keeps a copy of its run folder among the files of its W&B run. Where that
copy is missing or damaged, the history in the log still gives the measures over all prompts.
"""

from __future__ import annotations

from pathlib import Path

from analysis import run_folder
from analysis.history import from_history
from analysis.saved import Found, LeftOut, NotData, SavedRun
from analysis.wandb_log import Log, NotALog, read_log

COPY = Path("files", "run_folder")


def accepts(folder: Path) -> bool:
    """Whether a W&B run lies in this very folder."""
    return next(folder.glob("*.wandb"), None) is not None


def accepts_file(source: str) -> bool:
    return source.endswith(".wandb") and Path(source).is_file()


def read_file(source: str) -> Found:
    """The run of a `.wandb` file, with the files beside it as far as there are any."""
    path = Path(source)
    try:
        return Found(runs=(read_run(path.parent, log=path),), left_out=())
    except NotData as reason:
        item = LeftOut(run_id=path.stem, place=str(path.resolve()), reason=str(reason))
        return Found(runs=(), left_out=(item,))


def read_run(folder: Path, *, log: Path | None = None) -> SavedRun:
    """One W&B run. Raises NotData where even the log holds no measures, or those of a failure."""
    try:
        return run_folder.read_run(folder / COPY)
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
    return from_history(
        run_id=said.run_id,
        study=said.group,
        place=str(folder.resolve()),
        config=said.config,
        summary=said.summary,
        history=said.history,
        lacking=_lacking(said, problem if (folder / COPY).exists() else f"no {COPY}"),
    )


def _lacking(said: Log, problem: str) -> str:
    if said.exit_code is None:
        return f"{problem}, and its W&B log breaks off"
    return problem
