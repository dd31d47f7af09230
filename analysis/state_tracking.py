"""Saved state-tracking runs to tables and figures.

    python -m analysis.state_tracking runs/state_tracking --out figures/state_tracking

Prints one table for each task and target, and draws accuracy by level and by depth. Contestants are
compared over their seeds: the mean, and in brackets or as a band the least and the most. Of a
contestant that was trained at several learning rates, those are shown that did best at the trained
level.
Exit code 2 for a source or path that is no good.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from analysis.saved import LeftOut, SourceError

FILES = ("config.yaml", "summary.json", "accuracy.parquet")


@dataclass(frozen=True, order=True)
class Contestant:
    """What distinguishes a model from the others; their order in tables and legends."""

    stateful: bool
    layers: int
    passes: int
    drawn: bool
    through: bool
    times: int

    @property
    def name(self) -> str:
        layers = f"{self.layers} layer{'s' if self.layers > 1 else ''}"
        longer = f", {self.times}× steps" if self.times > 1 else ""
        if not self.stateful:
            return f"plain, {layers}{longer}"
        how = "through" if self.through else "detached"
        drawn = "1 to " if self.drawn else ""
        return f"stateful, {layers}, {drawn}{self.passes} passes, {how}{longer}"


@dataclass(frozen=True)
class Run:
    """One finished run. ``accuracy`` has the columns depth, level and accuracy."""

    run_id: str
    task: str
    target: str
    contestant: Contestant
    seed: int
    rates: tuple[float, float]  # of AdamW, of Muon
    trained_level: int
    tested_level: int
    chance: float
    layer_passes: int
    seconds: float
    solved_level: int
    rest: str  # every other setting: runs that differ in it must not stand in one table
    accuracy: pd.DataFrame

    def at_full_depth(self) -> pd.Series:
        """Accuracy by level at the largest depth there is."""
        last = self.accuracy[self.accuracy["depth"] == self.accuracy["depth"].max()]
        return last.set_index("level")["accuracy"].sort_index()


def load(source: Path) -> tuple[tuple[Run, ...], tuple[LeftOut, ...]]:
    """The finished runs of a study folder, and the others.

    Raises:
        SourceError: there is no finished run, or runs differ in settings that no table shows.
    """
    if not source.is_dir():
        raise SourceError(f"{source} is not a folder of state-tracking runs.")
    runs, left_out = [], []
    for folder in sorted(path.parent for path in source.glob("*/status.json")):
        try:
            state = json.loads((folder / "status.json").read_text(encoding="utf-8"))["state"]
            if state != "finished":
                left_out.append(LeftOut(folder.name, str(folder), f"it is {state}"))
            else:
                runs.append(_read(folder))
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            reason = f"not a whole state-tracking run ({type(error).__name__}: {error})"
            left_out.append(LeftOut(folder.name, str(folder), " ".join(reason.split())))
    if not runs:
        raise SourceError(
            f"{source} holds no finished state-tracking run"
            f"{'; ' + left_out[0].reason if left_out else ''}."
        )
    kinds = sorted({run.rest for run in runs})
    if len(kinds) > 1:
        raise SourceError(
            f"{source} holds runs with different settings, which cannot be compared: {kinds[0]}"
            f" and {kinds[1]}."
        )
    return tuple(runs), tuple(left_out)


def _read(folder: Path) -> Run:
    config = yaml.safe_load((folder / FILES[0]).read_text(encoding="utf-8"))
    summary = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
    task, chosen = config["task"], config["contestant"]
    training = dict(config["training"])
    rates = (training.pop("learning_rate"), training.pop("matrix_learning_rate"))
    rest = {
        "trained_level": task["trained_level"],
        "tested_level": task["tested_level"],
        "test_words": config["test_words"],
        **config["size"],
        **training,
    }
    return Run(
        run_id=folder.name,
        task=task["name"],
        target=task["target"],
        contestant=Contestant(
            stateful=chosen["passes"] > 1,
            layers=chosen["layers"],
            passes=chosen["passes"],
            drawn=chosen["drawn"],
            through=chosen["through"],
            times=chosen["times"],
        ),
        seed=config["seed"],
        rates=rates,
        trained_level=task["trained_level"],
        tested_level=task["tested_level"],
        chance=summary["chance"],
        layer_passes=summary["layer_passes"],
        seconds=summary["seconds"],
        solved_level=summary["solved_level"],
        rest=", ".join(f"{key}={value}" for key, value in rest.items()),
        accuracy=pd.read_parquet(folder / FILES[2]),
    )


def at_best_rates(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Of each contestant's runs on a question, those at the rates that did best.

    Best is the largest mean accuracy at the trained level; no level beyond it has a say.
    """
    groups: dict[tuple[str, str, Contestant], dict[tuple[float, float], list[Run]]] = {}
    for run in runs:
        rates = groups.setdefault((run.task, run.target, run.contestant), {})
        rates.setdefault(run.rates, []).append(run)

    def score(same: list[Run]) -> float:
        return sum(float(run.at_full_depth()[run.trained_level]) for run in same) / len(same)

    return tuple(run for rates in groups.values() for run in max(rates.values(), key=score))


def by_contestant(runs: Sequence[Run]) -> dict[Contestant, list[Run]]:
    """The runs of each contestant, by seed."""
    groups: dict[Contestant, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.contestant, run.seed)):
        groups.setdefault(run.contestant, []).append(run)
    return groups


def by_question(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """The runs of each (task, target)."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.target != "state", run.task)):
        groups.setdefault((run.task, run.target), []).append(run)
    return groups


def markdown(runs: Sequence[Run]) -> str:
    """One table for each task and target, ready for a README."""
    parts = []
    for (task, target), group in by_question(runs).items():
        one = group[0]
        levels = _shown_levels(one)
        head = ["contestant", "rates", "seeds", *(f"level {level}" for level in levels)]
        head += ["solved to level", "layer passes", "s"]
        rows = [head, ["---"] * len(head)]
        for contestant, same in by_contestant(group).items():
            accuracies = [run.at_full_depth() for run in same]
            rates = " / ".join(f"{rate:g}" for rate in same[0].rates)
            cells = [contestant.name, rates, str(len(same))]
            for level in levels:
                values = [float(series[level]) for series in accuracies]
                cells.append(_spread(values))
            cells.append(", ".join(str(run.solved_level) for run in same))
            cells.append(f"{sum(run.layer_passes for run in same) / len(same):.0f}")
            cells.append(f"{sum(run.seconds for run in same) / len(same):.0f}")
            rows.append(cells)
        title = (
            f"{task}, target {target}: accuracy at full depth, trained to level"
            f" {one.trained_level}, chance {one.chance:.2f}"
        )
        lines = [f"| {' | '.join(cells)} |" for cells in rows]
        parts.append(f"{title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _shown_levels(run: Run) -> list[int]:
    half = max(1, run.trained_level // 2)
    between = (run.trained_level + run.tested_level) // 2
    return sorted({half, run.trained_level, between, run.tested_level})


def _spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} [{min(values):.2f}, {max(values):.2f}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.state_tracking", description="State-tracking runs, compared."
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a study folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="figures go here")
    arguments = parser.parse_args(argv)
    try:
        runs, left_out = load(arguments.source)
        for one in left_out:
            print(f"Left out: {one.run_id}: {one.reason}.", file=sys.stderr)
        runs = at_best_rates(runs)
        print(markdown(runs))
        from analysis.figures.drawing import save
        from analysis.figures.state_tracking import drawings

        command = ["python", "-m", "analysis.state_tracking", str(arguments.source)]
        for drawing in drawings(runs):
            for path in save(
                drawing, arguments.out, command=shlex.join([*command, "--out", "figures"])
            ):
                print(path, file=sys.stderr)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
