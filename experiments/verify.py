"""Computes a saved run again from its configuration, and says whether its trajectory comes back.

    python -m experiments.verify runs/mine            # one run at random; --all, --run, --seed

Exit codes: 0 reproduced, 1 a run is not, 2 there is no run to verify, 130 interrupted.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.converge.settings import ConvergeSettings
from experiments.runs.compute_once import RunError
from experiments.runs.folder import (
    CONFIG,
    STATUS,
    TRACKER,
    TRAJECTORY,
    changes_of,
    read_config,
    read_status,
    run_id,
)
from experiments.settings import ConfigError, parse
from stateful_gpt.console import cut, run_command

# Largest difference in nats that still counts as the same result, by the precision of a run.
# Another processor sums in another order, which changes the last bits of a pass, and the passes
# after it carry that on. Seen on 48 tokens at strengths -1 and 2, with the instructions of an older
# processor: 1e-5, 2e-14 and 0.15. The bounds leave room for longer texts and other models.
BOUNDS = {"float32": 1e-3, "float64": 1e-10, "bfloat16": 1.0}
KEYS = ["prompt_id", "step", "iteration", "position"]


def find(study: Path, wanted: list[str]) -> list[Path]:
    """The folders of the finished runs in and below a folder, by place, or those with these ids.

    Raises:
        FileNotFoundError: there is none; its text is one sentence.
    """
    places = sorted(path.parent for path in study.rglob(STATUS))
    # W&B's folders repeat the runs beside them, but may be all there is
    own = [place for place in places if TRACKER not in place.relative_to(study).parts]
    found = {
        place: run_id(place)
        for place in own or places
        if (place / TRAJECTORY).is_file() and read_status(place).get("state") == "finished"
    }
    if not found:
        named = cut(repr(str(study)))
        raise FileNotFoundError(f"STUDY must hold a finished run with a trajectory, got {named}")
    if missing := set(wanted).difference(found.values()):
        said = f"--run {cut(min(missing))}: no such finished run is in {cut(study)}"
        raise FileNotFoundError(said)
    return [place for place, name in found.items() if not wanted or name in wanted]


def settings_of(place: Path, runs_dir: Path) -> ConvergeSettings:
    """The settings of a saved run, to compute it elsewhere. Nothing in them is looked up: they may
    come from anywhere.
    """
    if (content := read_config(place)) is None:
        raise ConfigError(f"its {CONFIG} cannot be read")
    elsewhere = {"runs_dir": str(runs_dir), "tracking": {"mode": "disabled"}}
    return parse(content | elsewhere, ConvergeSettings)


def verify(place: Path) -> tuple[bool, str, str]:
    """Computes the run again, which takes as long as it took.

    Returns:
        whether it is reproduced, that in a sentence, and another one of what was different about
        the attempt, if anything.
    """
    name, before = run_id(place), read_status(place)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        try:
            settings = settings_of(place, Path(folder))
            import torch

            from experiments.converge.run import converge  # takes seconds, which a refusal need not

            if isinstance(threads := before.get("threads"), int) and 0 < threads <= 1024:
                torch.set_num_threads(threads)  # another number adds in another order
            again = converge(settings)
        except (ConfigError, RunError) as error:
            return False, f"{name} cannot be computed again: {error}", ""
        try:
            old, new = (_estimates(path / TRAJECTORY) for path in (place, again))
        except (OSError, ValueError, pa.ArrowException):
            return False, f"{name} cannot be compared: its {TRAJECTORY} cannot be read", ""
        was, now = _origin(before), _origin(read_status(again))
    others = [key for key in was if was[key] != now.get(key)]
    other = "; ".join(f"{cut(key)} {cut(was[key])}, now {cut(now.get(key))}" for key in others)
    warning = f"{name} was computed with {other}" if other else ""
    if again.name == name:
        reproduced, said = compare(old, new, settings.device.dtype)
    else:
        reproduced, said = False, f": its settings now give run {again.name}, so"
        said += " the model, the prompts or the defaults have changed since"
    return reproduced, f"{name} is {'' if reproduced else 'NOT '}reproduced{said}.", warning


def compare(old: pd.DataFrame, new: pd.DataFrame, dtype: str) -> tuple[bool, str]:
    """Whether two trajectories are the same within the bound of a precision, and how far apart they
    are, in words. What is no number is infinitely far from what is.
    """
    what = [*KEYS, "token_id"]
    before, after = old["log_prob"].to_numpy(), new["log_prob"].to_numpy()
    if before.dtype != after.dtype or not old[what].equals(new[what]):
        ends = [f"{len(one)} estimates to iteration {one['iteration'].max()}" for one in (old, new)]
        return False, f": its tokens, passes or precision are others ({', now '.join(ends)})"
    count = f"{len(old)} estimates of {old['prompt_id'].nunique()} prompts"
    # as whole numbers, 0 and -0 differ
    bits = f"u{before.itemsize}"
    same = before.view(bits) == after.view(bits)
    if same.all():
        return True, f" bit for bit: {count}"
    # processors write what is no number with other bits
    neither = np.isnan(before) & np.isnan(after)
    apart = np.where(same | neither, 0.0, np.nan_to_num(np.abs(before - after), nan=np.inf))
    where = ", ".join(f"{key.removesuffix('_id')} {cut(old[key][apart.argmax()])}" for key in KEYS)
    said = f"{(~same).sum()} of them differ, by at most {apart.max():.2g} nats ({where})"
    about = f"{BOUNDS[dtype]:g} nats, the bound for {dtype}"
    if apart.max() <= BOUNDS[dtype]:
        return True, f" within {about}, not bit for bit: {count}, {said}"
    return False, f": {count}, {said}, more than {about}"


def _estimates(path: Path) -> pd.DataFrame:
    table = pq.read_table(path, columns=[*KEYS, "token_id", "log_prob"])
    # what nothing predicts has probability 1: earlier versions stored that, now it is missing
    place = table.column_names.index("log_prob")
    table = table.set_column(place, "log_prob", table["log_prob"].fill_null(0.0))
    frame: pd.DataFrame = table.to_pandas()
    return frame.sort_values(KEYS, ignore_index=True)


def _origin(status: dict[str, Any]) -> dict[str, Any]:
    """What can make two computations of a run differ, by name."""
    return {
        "commit": str(status.get("commit"))[:12],
        "uncommitted changes": (changes_of(status) or "none")[:12],
        **(status.get("versions") or {}),
        "device": status.get("device"),
    }


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
    try:
        chosen = found = find(arguments.study, arguments.run)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not (arguments.all or arguments.run):
        chosen = [random.Random(arguments.seed).choice(found)]
        if len(found) > 1:
            print(f"Of {len(found)} runs, {run_id(chosen[0])} was drawn.", file=sys.stderr)
    code = 0
    for place in chosen:
        reproduced, sentence, warning = verify(place)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        print(sentence, flush=True)
        code = code if reproduced else 1
    return code


if __name__ == "__main__":
    sys.exit(main())
