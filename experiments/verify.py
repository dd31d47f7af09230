"""Computes a saved run again from its configuration, and says whether its trajectory comes back.

    python -m experiments.verify runs/mine            # one run at random; --all, --run, --seed

Exit codes: 0 reproduced, 1 a run is not, 2 there is no run to verify, 130 interrupted.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
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
from experiments.runs.folder import CONFIG, STATUS, TRACKER, TRAJECTORY, read_status
from experiments.settings import ConfigError, parse
from stateful_gpt.console import run_command

# Largest difference in nats that still counts as the same result, by the precision of a run.
# Another processor sums in another order, which changes the last bits of a pass, and the passes
# after it carry that on. Seen on 48 tokens at strengths -1 and 2, with the instructions of an older
# processor: 1e-5, 2e-14 and 0.15. The bounds leave room for longer texts and other models.
BOUNDS = {"float32": 1e-3, "float64": 1e-10, "bfloat16": 1.0}
KEYS = ["prompt_id", "step", "iteration", "position"]


class SourceError(Exception):
    """A study, or a wish about it, that cannot be served; its text is one sentence."""


def find(study: Path, wanted: list[str]) -> list[Path]:
    """The folders of the finished runs in and below a folder, by name, or those with these ids.

    Raises:
        SourceError: there is none.
    """
    places = sorted(path.parent for path in study.rglob(STATUS))
    # W&B's folders repeat the runs beside them, but may be all there is
    own = [place for place in places if TRACKER not in place.relative_to(study).parts]
    found = [
        place
        for place in own or places
        if (place / TRAJECTORY).is_file() and read_status(place).get("state") == "finished"
    ]
    if not found:
        raise SourceError(f"STUDY must hold a finished run with a trajectory, got {str(study)!r}")
    missing = set(wanted) - {place.name for place in found}
    if missing:
        raise SourceError(f"--run {min(missing)}: there is no such finished run in {study}")
    return [place for place in found if not wanted or place.name in wanted]


def settings_of(place: Path, runs_dir: Path) -> ConvergeSettings:
    """The settings of a saved run, to compute it elsewhere. Nothing in them is looked up: they may
    come from anywhere.

    Raises:
        ConfigError: they are not those of a convergence run.
    """
    try:
        content = dict(yaml.safe_load((place / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        raise ConfigError(f"its {CONFIG} cannot be read") from None
    elsewhere = {"runs_dir": str(runs_dir), "tracking": {"mode": "disabled"}}
    return parse(content | elsewhere, ConvergeSettings)


def verify(place: Path) -> tuple[bool, str, list[str]]:
    """Computes the run again, which takes as long as it took.

    Returns:
        whether it is reproduced, that in a sentence, and what was different about the attempt.
    """
    name = place.resolve().name
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        before = read_status(place)
        try:
            settings = settings_of(place, Path(folder))
            again = compute(settings, threads=before.get("threads"))
        except (ConfigError, RunError) as error:
            return False, f"{name} cannot be computed again: {error}", []
        try:
            old, new = (_estimates(path / TRAJECTORY) for path in (place, again))
        except (OSError, ValueError, pa.ArrowException):
            return False, f"{name} cannot be compared: its {TRAJECTORY} cannot be read", []
        other = differences(before, read_status(again))
        warnings = [f"{name} was computed {difference}" for difference in other]
    what = f"{len(old)} estimates of {old['prompt_id'].nunique()} prompts"
    bound = BOUNDS[settings.device.dtype]
    about = f"{bound:g} nats, the bound for {settings.device.dtype}"
    apart, said = compare(old, new)
    if again.name != name:
        reason = (
            f"its settings now give run {again.name}, so the model, the prompts or the defaults"
            " have changed since"
        )
    elif apart is None:
        reason = "its tokens, passes or precision are others"
    elif apart > bound:
        reason = f"more than {about}"
    elif not said:
        return True, f"{name} is reproduced bit for bit: {what}.", warnings
    else:
        sentence = f"{name} is reproduced within {about}, not bit for bit: {what}, {said}."
        return True, sentence, warnings
    return False, f"{name} is NOT reproduced: {reason}; {said or 'no estimate differs'}.", warnings


def compute(settings: ConvergeSettings, *, threads: Any) -> Path:
    """The folder of the new run."""
    import torch

    from experiments.converge.run import converge  # takes seconds, which a refusal need not

    if isinstance(threads, int) and 0 < threads <= 1024:
        torch.set_num_threads(threads)  # another number adds in another order
    return converge(settings)


def compare(old: pd.DataFrame, new: pd.DataFrame) -> tuple[float | None, str]:
    """How far apart in nats two trajectories are at most, and that in words, empty if every bit is
    the same. None if they are not of the same tokens, passes and precision; what is no number is
    infinitely far from what is.
    """
    both = old.merge(new, on=KEYS, suffixes=("", "_again"))
    before, after = both["log_prob"], both["log_prob_again"]
    same = _bits(before) == _bits(after)
    apart = np.where(same, 0.0, (before - after).abs().fillna(np.inf))
    largest = float(apart.max(initial=0.0))
    said = ""
    if not same.all():
        row = both.loc[int(np.argmax(apart))]
        where = ", ".join(f"{key.removesuffix('_id')} {row[key]}" for key in KEYS)
        said = f"{(~same).sum()} of them differ, by at most {largest:.2g} nats ({where})"
    what = [*KEYS, "token_id"]
    alike = before.dtype == after.dtype and old[what].equals(new[what])
    return largest if alike else None, said


def _estimates(path: Path) -> pd.DataFrame:
    table = pq.read_table(path, columns=[*KEYS, "token_id", "log_prob"])
    # what nothing predicts has probability 1: earlier versions stored that, now it is missing
    place = table.column_names.index("log_prob")
    table = table.set_column(place, "log_prob", table["log_prob"].fill_null(0.0))
    frame: pd.DataFrame = table.to_pandas()
    return frame.sort_values(KEYS, ignore_index=True)


def _bits(values: "pd.Series[Any]") -> npt.NDArray[Any]:
    """As whole numbers: 0 and -0 differ, and what is no number equals itself."""
    array: npt.NDArray[Any] = values.to_numpy()
    return array.view(f"u{array.itemsize}")


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
    digest = (status.get("changes") or {}).get("sha256", "")[:12]
    if not status.get("dirty"):
        return "no uncommitted changes"
    return f"uncommitted changes {digest}".rstrip()


def main() -> int:
    return run_command("verify", _main)


def _main() -> int:
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
    reproduced = True
    try:
        chosen = found = find(arguments.study, arguments.run)
        if not (arguments.all or arguments.run):
            chosen = [random.Random(arguments.seed).choice(found)]
            if len(found) > 1:
                print(f"Of {len(found)} runs, {chosen[0].name} was drawn.", file=sys.stderr)
        for place in chosen:
            well, sentence, warnings = verify(place)
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr)
            print(sentence, flush=True)
            reproduced &= well
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0 if reproduced else 1


if __name__ == "__main__":
    sys.exit(main())
