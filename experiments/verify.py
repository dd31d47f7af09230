"""Computes a saved run again from its configuration, and says whether its trajectory comes back.

    python -m experiments.verify runs/mine            # one run at random; --all, --run, --seed

Exit codes: 0 reproduced, 1 a run is not, 2 there is no run to verify, 130 interrupted.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from experiments.converge.settings import ConvergeSettings
from experiments.runs.compute_once import RunError
from experiments.runs.files import read_json
from experiments.runs.folder import CONFIG, STATUS, TRACKER, TRAJECTORY
from experiments.settings import ConfigError, parse

# Largest difference in nats that still counts as the same result, by the precision of a run.
# Another processor sums in another order, which changes the last bits of a pass, and the passes
# after it carry that on. Seen on 48 tokens at strengths -1 and 2, with the instructions of an older
# processor: 1e-5, 2e-14 and 0.15. The bounds leave room for longer texts and other models.
BOUNDS = {"float32": 1e-3, "float64": 1e-10, "bfloat16": 1.0}
KEYS = ["prompt_id", "step", "iteration", "position"]


class SourceError(Exception):
    """A study, or a wish about it, that cannot be served; its text is one sentence."""


@dataclass(frozen=True)
class Verdict:
    """Whether one run is reproduced, in a sentence, and what was different about the attempt."""

    reproduced: bool
    sentence: str
    warnings: tuple[str, ...] = ()


def find(study: Path, wanted: list[str]) -> list[Path]:
    """The folders of the finished runs in and below a folder, by name, or those with these ids.

    Raises:
        SourceError: there is none.
    """
    places = sorted(path.parent for path in study.rglob(STATUS))
    inside = [place.relative_to(study).parts for place in places]
    # W&B's folders repeat the runs beside them, but may be all there is
    own = [place for place, parts in zip(places, inside, strict=True)
           if not any(part == TRACKER or part.startswith(".") for part in parts)]  # fmt: skip
    found = [place for place in own or places if _is_finished(place)]
    if not found:
        raise SourceError(f"STUDY must hold a finished run with a trajectory, got {str(study)!r}")
    missing = set(wanted) - {place.name for place in found}
    if missing:
        raise SourceError(f"--run {min(missing)}: there is no such finished run in {study}")
    return [place for place in found if not wanted or place.name in wanted]


def _is_finished(place: Path) -> bool:
    status = read_json(place / STATUS)
    finished = isinstance(status, dict) and status.get("state") == "finished"
    return finished and (place / TRAJECTORY).is_file()


def settings_of(place: Path, runs_dir: Path) -> ConvergeSettings:
    """The settings of a saved run, to compute it elsewhere. Nothing in them is looked up: they may
    come from anywhere.

    Raises:
        ConfigError: they are not those of a convergence run.
    """
    try:
        content = yaml.safe_load((place / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        raise ConfigError(f"its {CONFIG} cannot be read") from None
    if not isinstance(content, dict):
        raise ConfigError(f"its {CONFIG} must hold plain settings")
    return parse(
        {**content, "runs_dir": str(runs_dir), "tracking": {"mode": "disabled"}}, ConvergeSettings
    )


def verify(place: Path) -> Verdict:
    """Computes the run again, which takes as long as it took."""
    name = place.resolve().name
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        before = read_json(place / STATUS)
        try:
            settings = settings_of(place, Path(folder))
            again = compute(settings, threads=before.get("threads"))
        except (ConfigError, RunError) as error:
            return Verdict(False, f"{name} cannot be computed again: {error}")
        try:
            found = compare(*(_estimates(path / TRAJECTORY) for path in (place, again)))
        except (OSError, ValueError, pa.ArrowException):
            return Verdict(False, f"{name} cannot be compared: its {TRAJECTORY} cannot be read")
        other = differences(before, read_json(again / STATUS))
        warnings = tuple(f"{name} was computed {difference}" for difference in other)
    what = f"{found.estimates} estimates of {found.prompts} prompts"
    bound = BOUNDS[settings.device.dtype]
    about = f"{bound:g} nats, the bound for {settings.device.dtype}"
    if again.name != name:
        reason = (
            f"its settings now give run {again.name}, so the model, the prompts or the defaults"
            " have changed since"
        )
    elif found.mismatch is None and not found.differing:
        return Verdict(True, f"{name} is reproduced bit for bit: {what}.", warnings)
    elif found.mismatch is None and found.largest <= bound:
        sentence = f"{name} is reproduced within {about}, not bit for bit: {what}, {found}."
        return Verdict(True, sentence, warnings)
    else:
        reason = found.mismatch or f"more than {about}"
    return Verdict(False, f"{name} is NOT reproduced: {reason}; {found}.", warnings)


def compute(settings: ConvergeSettings, *, threads: Any) -> Path:
    """The folder of the new run."""
    import torch

    from experiments.converge.run import converge  # takes seconds, which a refusal need not

    if isinstance(threads, int) and not isinstance(threads, bool) and 0 < threads <= 1024:
        torch.set_num_threads(threads)  # another number adds in another order
    return converge(settings)


@dataclass(frozen=True)
class Comparison:
    """What became of every stored estimate when it was computed again."""

    estimates: int  # stored
    prompts: int
    differing: int  # estimates of other bits, over those that both have
    largest: float  # nats; infinite where one of two is no number
    where: str  # of the largest difference
    mismatch: str | None  # why the two do not hold the same tokens at all

    def __str__(self) -> str:
        if not self.differing:
            return "no estimate differs that both have"
        return f"{self.differing} of them differ, by at most {self.largest:.2g} nats ({self.where})"


def compare(old: pd.DataFrame, new: pd.DataFrame) -> Comparison:
    """Two trajectories by prompt, step, iteration and position."""
    both = old.merge(new, on=KEYS, suffixes=("", "_again"))
    before, after = both["log_prob"].to_numpy(), both["log_prob_again"].to_numpy()
    same = _bits(before) == _bits(after) if before.dtype == after.dtype else before == after
    with np.errstate(invalid="ignore"):  # infinity less infinity
        apart = np.where(same, 0.0, np.abs(before.astype(float) - after.astype(float)))
    apart = np.where(np.isnan(apart), np.inf, apart)  # nats
    row: Any = both.loc[int(np.argmax(apart))] if len(both) else {}
    return Comparison(
        estimates=len(old),
        prompts=old["prompt_id"].nunique(),
        differing=int((~same).sum()),
        largest=float(apart.max(initial=0.0)),
        where=", ".join(f"{key.removesuffix('_id')} {row[key]}" for key in KEYS if len(both)),
        mismatch=_mismatch(old, new),
    )


def _estimates(path: Path) -> pd.DataFrame:
    table = pq.read_table(path, columns=[*KEYS, "token_id", "log_prob"])
    # what nothing predicts has probability 1: earlier versions stored that, now it is missing
    place = table.column_names.index("log_prob")
    table = table.set_column(place, "log_prob", table["log_prob"].fill_null(0.0))
    frame: pd.DataFrame = table.to_pandas()
    return frame.sort_values(KEYS, ignore_index=True)


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """As whole numbers: 0 and -0 differ, and what is no number equals itself."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _mismatch(old: pd.DataFrame, new: pd.DataFrame) -> str | None:
    if old["log_prob"].dtype != new["log_prob"].dtype:
        return f"estimates are {new['log_prob'].dtype} instead of {old['log_prob'].dtype}"
    if len(old) != len(new):
        return f"there are {len(new)} estimates instead of {len(old)}"
    if not old[KEYS].equals(new[KEYS]):
        return "prompts, steps or passes are others"
    other = np.flatnonzero(old["token_id"].to_numpy() != new["token_id"].to_numpy())
    if not len(other):
        return None
    row = old.loc[int(other[0])]
    return (
        f"prompt {row['prompt_id']} has another token at step {row['step']},"
        f" position {row['position']}"
    )


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What about the attempt was not as it had been."""
    if old.get("commit") != new.get("commit"):
        before, after = (str(status.get("commit") or "unknown")[:12] for status in (old, new))
        yield f"at commit {before}, now the commit is {after}"
    before, after = (_changes(status) for status in (old, new))
    if before != after:
        yield f"with {before}, now there are {after}"
    versions = new.get("versions") or {}
    other = [
        f"{name} {version}, now {versions.get(name, 'absent')}"
        for name, version in (old.get("versions") or {}).items()
        if versions.get(name) != version
    ]
    if other:
        yield f"with {'; '.join(other)}"
    if old.get("device") != new.get("device"):
        yield f"on {old.get('device')}, now on {new.get('device')}"


def _changes(status: dict[str, Any]) -> str:
    if changes := status.get("changes"):
        return f"uncommitted changes {changes['sha256'][:12]}"
    return "uncommitted changes" if status.get("dirty") else "no uncommitted changes"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.verify",
        description="Compute a saved run again: is its trajectory reproduced?",
        epilog="Exit codes: 0 reproduced, 1 a run is not, 2 there is no run to verify.",
    )
    parser.add_argument("study", metavar="STUDY", type=Path, help="its folder, or a run's")
    parser.add_argument(
        "--run", action="append", default=[], metavar="RUN_ID", help="only this run (repeatable)"
    )
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--all", action="store_true", help="every run, not one at random")
    many.add_argument("--seed", type=int, metavar="N", help="of the draw of the run")
    arguments = parser.parse_args()
    try:
        chosen = found = find(arguments.study, arguments.run)
        if not (arguments.all or arguments.run):
            chosen = [random.Random(arguments.seed).choice(found)]
            if len(found) > 1:
                print(f"Of {len(found)} runs, {chosen[0].name} was drawn.", file=sys.stderr)
        reproduced = True
        for place in chosen:
            verdict = verify(place)
            for warning in verdict.warnings:
                print(f"warning: {warning}", file=sys.stderr)
            print(verdict.sentence, flush=True)
            reproduced &= verdict.reproduced
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0 if reproduced else 1


if __name__ == "__main__":
    sys.exit(main())
