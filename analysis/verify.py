"""Computes a saved run again from its configuration, and says whether its trajectory comes back.

The runner is started as a process of its own, in a temporary runs_dir; this module knows its
command line and the run folder that it writes, and imports neither the runner nor torch.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis import run_folder
from analysis.compare import Comparison, compare
from analysis.runs import Runs
from analysis.saved import NotData, SavedRun, SourceError

ROOT = Path(__file__).parent.parent
# Largest difference in nats that still counts as the same result, by the precision of a run.
# Another processor sums in another order, which changes the last bits of a pass, and the passes
# after it carry that on. Seen on 48 tokens at strengths -1 and 2, with the instructions of an older
# processor: 1e-5, 2e-14 and 0.15. The bounds leave room for longer texts and other models.
BOUNDS = {"float32": 1e-3, "float64": 1e-10, "bfloat16": 1.0}
# a setting, never an option of the command line or a group
KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
OURS = ("tracking", "runs_dir", "hydra")  # settings that say where a run goes, not what it is


@dataclass(frozen=True)
class Verdict:
    """Whether one run is reproduced, in a sentence, and what was different about the attempt."""

    reproduced: bool
    sentence: str
    warnings: tuple[str, ...]


def choose(runs: Runs, *, seed: int | None, everything: bool) -> tuple[SavedRun, ...]:
    """One run at random, or all, in the order of their ids. SourceError if none can be verified."""
    saved = [runs.saved[key] for key in runs.runs.index]
    able = sorted((run for run in saved if run.trajectory), key=lambda run: (run.study, run.run_id))
    if not able:
        raise SourceError("No run has a trajectory to verify: W&B's history holds none.")
    return tuple(able) if everything else (random.Random(seed).choice(able),)


def verify(run: SavedRun) -> Verdict:
    """Computes the run again, which takes as long as it took."""
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        runs_dir = Path(folder) / "runs"
        complaint = _compute(run, runs_dir)
        if complaint is not None:
            return Verdict(False, f"{run.run_id} cannot be computed again: {complaint}", ())
        try:
            (place,) = (path.parent for path in runs_dir.glob(f"*/*/{run_folder.STATUS}"))
            again = run_folder.read_run(place)
        except (NotData, ValueError) as reason:
            return Verdict(False, f"{run.run_id}: the new run cannot be read: {reason}.", ())
        assert run.trajectory is not None
        assert again.trajectory is not None
        compared = compare(run.trajectory, again.trajectory)
        warnings = tuple(_warnings(run, again))
        if again.run_id != run.run_id:
            sentence = (
                f"{run.run_id} is NOT reproduced: its settings now give run {again.run_id}, so the "
                f"model, the prompts or the defaults have changed since; {_difference(compared)}."
            )
            return Verdict(False, sentence, warnings)
        return _verdict(run, compared, warnings)


def _verdict(run: SavedRun, compared: Comparison, warnings: tuple[str, ...]) -> Verdict:
    what = f"{compared.estimates} estimates of {compared.prompts} prompts"
    if compared.exact:
        sentence = f"{run.run_id} is reproduced bit for bit: {what}."
        return Verdict(True, sentence, warnings)
    dtype = str(_nested(run.config, "device", "dtype") or "float32")
    bound = BOUNDS.get(dtype, BOUNDS["float32"])
    if compared.mismatch is None and compared.largest <= bound:
        sentence = (
            f"{run.run_id} is reproduced within {bound:g} nats, the bound for {dtype}, not bit for "
            f"bit: {what}, {_difference(compared)}."
        )
        return Verdict(True, sentence, warnings)
    reason = compared.mismatch or f"more than {bound:g} nats, the bound for {dtype}"
    sentence = f"{run.run_id} is NOT reproduced: {reason}; {_difference(compared)}."
    return Verdict(False, sentence, warnings)


def _difference(compared: Comparison) -> str:
    if not compared.differing:
        return "no estimate differs that both have"
    return (
        f"{compared.differing} of them differ, by at most {compared.largest:.2g} nats "
        f"({compared.where})"
    )


def _compute(run: SavedRun, runs_dir: Path) -> str | None:
    """Runs the runner; what it has to complain about, or None."""
    words = [sys.executable, "-m", "experiments.converge", *overrides(run.config)]
    words += [f"runs_dir={_quoted(str(runs_dir))}", "tracking.mode=disabled"]
    # the runner of this very checkout, wherever the command is typed
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    threads = run.status.get("threads")
    if isinstance(threads, int) and not isinstance(threads, bool) and 0 < threads <= 1024:
        environment["OMP_NUM_THREADS"] = str(threads)  # another number adds in another order
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (said or lines or [f"the runner ended with exit code {done.returncode}"])[-1]


def overrides(config: Mapping[str, object]) -> list[str]:
    """A stored configuration as words of the runner's command line, one for each setting.

    Raises SourceError at a key that is none: a configuration from elsewhere may hold anything.
    """
    leaves = [(key, value) for key, value in _leaves(config) if key.split(".")[0] not in OURS]
    for key, _ in leaves:
        if not KEY.fullmatch(key):
            raise SourceError(f"The configuration has a key that is no setting: {key!r}.")
    return [f"{key}={_value(value)}" for key, value in leaves]


def _leaves(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(value: object) -> str:
    """As Hydra's grammar spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(_value(item) for item in value)}]"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    """In quotes; a backslash counts only where it stands before the quote that ends or escapes."""
    parts = []
    for index, part in enumerate(text.split("'")):
        backslashes = len(part) - len(part.rstrip("\\"))
        if index:
            parts.append("\\'")
        parts.append(part + "\\" * backslashes)
    return f"'{''.join(parts)}'"


def _warnings(old: SavedRun, new: SavedRun) -> Iterator[str]:
    """What about the attempt was not as it had been."""
    if old.status.get("commit") != new.status.get("commit"):
        yield (
            f"{old.run_id} was computed at commit {_short(old)}, now the commit is {_short(new)}"
        )
    changes = [_nested(run.status, "changes", "sha256") for run in (old, new)]
    if changes[0] != changes[1] or old.status.get("dirty") != new.status.get("dirty"):
        states = [_tree(run) for run in (old, new)]
        yield f"{old.run_id} was computed with {states[0]}, now there are {states[1]}"
    before, after = (run.status.get("versions") for run in (old, new))
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        other = [
            f"{name} {version}, now {after.get(name, 'absent')}"
            for name, version in before.items()
            if after.get(name) != version
        ]
        if other:
            yield f"{old.run_id} was computed with {'; '.join(other)}"
    if old.status.get("device") != new.status.get("device"):
        yield (
            f"{old.run_id} was computed on {old.status.get('device')}, "
            f"now on {new.status.get('device')}"
        )


def _tree(run: SavedRun) -> str:
    sha256 = _nested(run.status, "changes", "sha256")
    if sha256 is not None:
        return f"uncommitted changes {str(sha256)[:12]}"
    return "uncommitted changes" if run.status.get("dirty") else "no uncommitted changes"


def _short(run: SavedRun) -> str:
    return str(run.status.get("commit") or "unknown")[:12]


def _nested(mapping: Mapping[str, object], *keys: str) -> object:
    value: object = mapping
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
