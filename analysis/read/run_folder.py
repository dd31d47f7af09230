"""Reads a run folder.

A run folder holds `config.yaml`, `status.json`, `summary.json`, `iterations.parquet` and
`trajectory.parquet` (a file or a partitioned folder). Only a run whose status says `finished` and
whose files can all be read is data. Knows nothing of figures, tables or other kinds of source.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import yaml

from analysis.read.saved import MEASURES, TRAJECTORY_COLUMNS, NotData, SavedRun

STATUS = "status.json"
MARKS = (STATUS, "config.yaml", "summary.json", "trajectory.parquet", "iterations.parquet")
TRACEBACK = "traceback.txt"
ITERATION_KEYS = ("prompt_id", "step", "iteration")
PARTITION_TYPES = {"prompt_id": pa.string(), "step": pa.int64(), "iteration": pa.int64()}
# prompts and tokens repeat from pass to pass: as dictionaries they load without one object per row
PARQUET = ds.ParquetFileFormat(
    read_options=ds.ParquetReadOptions(dictionary_columns={"prompt_id", "token"})
)
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DAMAGE = (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError, pa.ArrowException)


def accepts(folder: Path) -> bool:
    """Whether it is a run folder, whole or not."""
    return any((folder / mark).exists() for mark in MARKS)


def read_run(folder: Path, *, finished: bool = True) -> SavedRun:
    """One run folder. Raises NotData unless it is whole and, if asked for, finished."""
    status = state_of(folder) if finished else mapping(folder / STATUS)
    config = mapping(folder / "config.yaml")
    summary = mapping(folder / "summary.json")
    prompts = summary.get("prompts")
    if not isinstance(prompts, list) or not all(
        isinstance(prompt, dict) and "prompt_id" in prompt for prompt in prompts
    ):
        raise NotData("summary.json lists no prompts")
    trajectory = _trajectory(folder / "trajectory.parquet")
    return SavedRun(
        run_id=str(summary.get("run_id") or folder.resolve().name),
        study=str(config.get("study") or summary.get("study") or folder.resolve().parent.name),
        place=str(folder.resolve()),
        config=config,
        status=status,
        summary=summary,
        iterations=_iterations(folder / "iterations.parquet"),
        trajectory=lambda: _table(trajectory),
    )


def state_of(folder: Path) -> dict[str, object]:
    """The status of a finished run. Raises NotData for any other, naming a traceback it left."""
    status = mapping(folder / STATUS)
    state = status.get("state")
    if state != "finished":
        why = str(state or "no state")
        raise NotData(f"{why}: {folder / TRACEBACK}" if (folder / TRACEBACK).exists() else why)
    return status


def mapping(path: Path) -> dict[str, object]:
    """The content of a JSON or YAML file. Raises NotData if it is not there or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        content = (
            json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=YAML_LOADER)
        )
    except FileNotFoundError:
        raise NotData(f"no {path.name}") from None
    except DAMAGE:
        raise NotData(f"unreadable {path.name}") from None
    if not isinstance(content, dict):
        raise NotData(f"unreadable {path.name}")
    return {str(key): value for key, value in content.items()}


def parquet(path: Path) -> pd.DataFrame:
    """A Parquet file. Raises NotData."""
    try:
        # a ParquetFile, not read_table: no partition columns are guessed from folder names
        with pq.ParquetFile(path) as file:
            frame: pd.DataFrame = file.read().to_pandas(ignore_metadata=True)
            return frame
    except FileNotFoundError:
        raise NotData(f"no {path.name}") from None
    except DAMAGE:
        raise NotData(f"unreadable {path.name}") from None


def _iterations(path: Path) -> pd.DataFrame:
    frame = parquet(path)
    _require(frame.columns, ITERATION_KEYS, path.name)
    wanted = {name: float for name in MEASURES if name in frame}
    try:
        return frame.astype({"prompt_id": str, "step": int, "iteration": int, **wanted})
    except DAMAGE:
        raise NotData(f"{path.name} has columns of other types") from None


def _trajectory(path: Path) -> ds.Dataset:
    if not path.exists():
        raise NotData(f"no {path.name}")
    try:
        dataset = ds.dataset(path, format=PARQUET, partitioning=_partitioning(path))
        next(dataset.get_fragments()).count_rows()  # opens the first file: an empty folder fails
    except (*DAMAGE, StopIteration):
        raise NotData(f"unreadable {path.name}") from None
    _require(dataset.schema.names, TRAJECTORY_COLUMNS, path.name)
    types = {name: dataset.schema.field(name).type for name in TRAJECTORY_COLUMNS}
    if not (
        all(pa.types.is_integer(types[name]) for name in ("step", "iteration", "position"))
        and pa.types.is_floating(types["log_prob"])
    ):
        raise NotData(f"{path.name} has columns of other types")
    return dataset


def _table(trajectory: ds.Dataset) -> pa.Table:
    try:
        return trajectory.to_table(columns=list(TRAJECTORY_COLUMNS))
    except DAMAGE as error:
        raise NotData(f"unreadable trajectory.parquet ({type(error).__name__})") from None


def _partitioning(path: Path) -> ds.Partitioning | None:
    """`prompt_id=007` is text, never the number 7: the types are stated, not inferred."""
    if not path.is_dir():
        return None
    keys: list[str] = []
    level = path
    while True:
        folders = sorted(p for p in level.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders or "=" not in folders[0].name:
            break
        level = folders[0]
        keys.append(level.name.partition("=")[0])
    schema = pa.schema([(key, PARTITION_TYPES.get(key, pa.string())) for key in keys])
    return ds.partitioning(schema, flavor="hive")


def _require(names: object, wanted: tuple[str, ...], file: str) -> None:
    missing = [name for name in wanted if name not in set(names)]  # type: ignore[call-overload]
    if missing:
        raise NotData(f"{file} has no column {', '.join(missing)}")
