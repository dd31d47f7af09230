"""Reads a run folder.

A run folder holds `config.yaml`, `status.json`, `summary.json`, `iterations.parquet` and
`trajectory.parquet`. Only a run whose status says `finished` and whose files can all be read is
data. Knows nothing of figures, tables or other kinds of source.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from analysis.read.saved import MEASURES, TRAJECTORY_COLUMNS, NotData, SavedRun

STATUS = "status.json"
MARKS = (STATUS, "config.yaml", "summary.json", "trajectory.parquet", "iterations.parquet")
TRACEBACK = "traceback.txt"
# ours have 2 at most, where hundreds of passes repeat estimates at rest; a few bytes from elsewhere
# could claim rows that fill the memory
ROWS_PER_BYTE = 16
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DAMAGE = (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError, pa.ArrowException)


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
    if not isinstance(summary.setdefault("overall", {}), dict):
        raise NotData("summary.json says nothing of all prompts")
    trajectory = folder / "trajectory.parquet"
    _check_trajectory(trajectory, decode=finished and "checksums" not in status)
    repeated = ["prompt_id", "token"]
    return SavedRun(
        run_id=str(summary.get("run_id") or folder.resolve().name),
        study=str(config.get("study") or summary.get("study") or folder.resolve().parent.name),
        place=str(folder.resolve()),
        config=config,
        status=status,
        summary=summary,
        iterations=_iterations(folder / "iterations.parquet"),
        trajectory=lambda: parquet(trajectory, columns=TRAJECTORY_COLUMNS, repeated=repeated),
    )


def state_of(folder: Path) -> dict[str, Any]:
    """The status of a finished run whose files are as they were written.

    Raises NotData for any other, naming a traceback it left.
    """
    status = mapping(folder / STATUS)
    state = status.get("state")
    if state != "finished":
        why = str(state or "no state")
        raise NotData(f"{why}: {folder / TRACEBACK}" if (folder / TRACEBACK).exists() else why)
    check(folder, status.get("checksums"))
    return status


def check(folder: Path, checksums: Any) -> None:
    """Raises NotData unless the files are those that had these checksums; some have none."""
    for name, before in checksums.items() if isinstance(checksums, dict) else ():
        path = regular(folder / Path(name).name)
        try:
            with path.open("rb") as stream:
                now = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            raise NotData(f"unreadable {path.name}") from None
        if now != before:
            raise NotData(f"{name} is not as it was written")


def regular(path: Path) -> Path:
    """Raises NotData unless it is a file: a pipe would be waited for, a device never ends."""
    if not path.is_file():
        raise NotData(f"{'unreadable' if path.exists() else 'no'} {path.name}")
    return path


def mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON or YAML file. Raises NotData if it is not there or no mapping."""
    try:
        text = regular(path).read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        content = json.loads(text) if is_json else yaml.load(text, Loader=YAML_LOADER)
        return {str(key): value for key, value in content.items()}
    except (*DAMAGE, AttributeError):
        raise NotData(f"unreadable {path.name}") from None


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """By dotted key; what has no parts comes first, and a list is a text."""
    found: dict[str, Any] = {}
    for key, value in sorted(settings.items(), key=lambda item: isinstance(item[1], Mapping)):
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = ",".join(map(str, value)) if isinstance(value, list) else value
    return found


def parquet(
    path: Path, *, columns: list[str] | None = None, repeated: Sequence[str] = ()
) -> pa.Table:
    """A Parquet file, whole or some of its columns. Raises NotData.

    Texts that are `repeated` from row to row are read as dictionaries: not an object a row.
    """
    with _opened(path, repeated) as file:
        table = file.read(columns).replace_schema_metadata()
        table.validate(full=True)  # its texts are UTF-8
        return table


@contextmanager
def _opened(path: Path, repeated: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(regular(path), read_dictionary=list(repeated)) as file:
            rows, size = file.metadata.num_rows, path.stat().st_size
            if rows > ROWS_PER_BYTE * size:
                raise NotData(f"{path.name} claims {rows:,} rows in {size:,} bytes")
            yield file
    except DAMAGE:
        raise NotData(f"unreadable {path.name}") from None


def _iterations(path: Path) -> pd.DataFrame:
    frame: pd.DataFrame = parquet(path).to_pandas()
    keys = {"prompt_id": str, "step": int, "iteration": int}
    _require(frame.columns, keys, path)
    try:
        return frame.astype(keys | {name: float for name in MEASURES if name in frame})
    except DAMAGE:
        raise NotData(f"{path.name} has columns of other types") from None


def _check_trajectory(path: Path, *, decode: bool) -> None:
    """Raises NotData unless it is there with the columns that it must have.

    ``decode`` looks at all of it, as far as what is packed tells of damage.
    """
    with _opened(path) as file:
        schema = file.schema_arrow
        for _ in file.iter_batches() if decode else ():
            pass
    _require(schema.names, TRAJECTORY_COLUMNS, path)
    whole = [schema.field(name).type for name in ("step", "iteration", "position")]
    log_prob = schema.field("log_prob").type
    if not all(map(pa.types.is_integer, whole)) or not pa.types.is_floating(log_prob):
        raise NotData(f"{path.name} has columns of other types")


def _require(names: Collection[str], wanted: Collection[str], path: Path) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise NotData(f"{path.name} has no column {', '.join(missing)}")
