"""Trained models as a table and a figure: held-out loss by the depth of the recurrence.

    python -m analysis.trainings SOURCE... [--out DIR] [--csv FILE]

A SOURCE is a model folder that `experiments.train` wrote, or a folder of such. Trainings that
differ in nothing but their seed are one row and one line: mean and spread. Never imports torch.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from safetensors import SafetensorError, safe_open

from analysis.output import write_whole
from analysis.saved import SourceError

MARK = "depths.json"
# where a training is kept and where its data lay does not change what it is
FREE = ("seed", "corpus")


@dataclass(frozen=True)
class Training:
    """One finished training; losses in nats per token, index = depth.

    ``nll_full`` is the loss at depth T − 1, and None of a plain model.
    """

    name: str
    settings: Mapping[str, object]  # flat, by dotted key
    parameters: int
    tokens_read: int
    nll: tuple[float, ...]
    kl: tuple[float, ...]
    nll_full: float | None
    contracts: bool
    characters_per_token: float

    @property
    def trained_depth(self) -> int | None:
        """The depth of the last pass that was trained; None of a plain model."""
        return int(str(self.settings["training.passes"])) - 1 if self.kl else None

    @property
    def generating(self) -> float:
        """The loss at the depth that text is generated at."""
        return self.nll[0] if self.nll_full is None else self.nll_full


@dataclass(frozen=True)
class Group:
    """Trainings that differ in their seed alone."""

    label: str
    trainings: tuple[Training, ...]

    def values(self, depth: int | None) -> list[float]:
        """The losses at a depth, None being T − 1; empty where there is no such depth."""
        if depth is None:
            return [one.generating for one in self.trainings]
        return [one.nll[depth] for one in self.trainings if depth < len(one.nll)]


def load_trainings(sources: Sequence[str]) -> tuple[Training, ...]:
    """All finished trainings at or below the sources, by name. SourceError if there is none."""
    found: dict[Path, Training] = {}
    for source in sources:
        folders = list(_folders(Path(source)))
        if not folders:
            raise SourceError(f"{source}: there is no finished training in it (no {MARK}).")
        for folder in folders:
            found[folder.resolve()] = _read(folder)
    return tuple(found[path] for path in sorted(found))


def grouped(trainings: Sequence[Training]) -> tuple[Group, ...]:
    """Trainings by all their settings but the seed, plain models first, best last."""
    groups: dict[str, list[Training]] = {}
    for one in trainings:
        key = json.dumps({k: v for k, v in one.settings.items() if not _free(k)}, sort_keys=True)
        groups.setdefault(key, []).append(one)
    labels = _labels([group[0] for group in groups.values()])
    made = [
        Group(label, tuple(group)) for label, group in zip(labels, groups.values(), strict=True)
    ]
    return tuple(
        sorted(
            made,
            key=lambda g: (bool(g.trainings[0].kl), -statistics.fmean(g.values(None)), g.label),
        )
    )


def table(groups: Sequence[Group]) -> pd.DataFrame:
    """A row a group; losses in nats per token as mean and standard deviation over its seeds."""
    rows = []
    for group in groups:
        first = group.trainings[0]
        depth = first.trained_depth
        row: dict[str, object] = {
            "model": group.label,
            "seeds": len(group.trainings),
            "parameters": first.parameters,
            "tokens read (M)": round(
                statistics.fmean(t.tokens_read for t in group.trainings) / 1e6, 2
            ),
            "depth 0": spread(group.values(0)),
            "depth 1": spread(group.values(1)) if first.kl else "–",
            "depth D−1": spread(group.values(depth)) if depth is not None else "–",
            "depth D": spread(group.values(depth + 1)) if depth is not None else "–",
            "depth T−1": spread(group.values(None)) if first.kl else "–",
            "nats/character": spread(
                [t.generating / t.characters_per_token for t in group.trainings]
            ),
            "KL falls": f"{sum(t.contracts for t in group.trainings)} of {len(group.trainings)}"
            if first.kl
            else "–",
        }
        rows.append(row)
    return pd.DataFrame(rows)


def spread(values: Sequence[float]) -> str:
    """`3.412 ± 0.004`: mean and standard deviation; a single value stands alone."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    return f"{mean:.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{mean:.4f}"


def markdown(frame: pd.DataFrame) -> str:
    """The frame as a Markdown table with aligned columns."""
    rows = [list(map(str, frame.columns)), *frame.astype(str).to_numpy().tolist()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _folders(folder: Path) -> Iterator[Path]:
    if (folder / MARK).is_file():
        yield folder
    elif folder.is_dir():
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.name.startswith(".") and inner.name != "wandb":
                yield from _folders(inner)


def _read(folder: Path) -> Training:
    try:
        depths = json.loads((folder / MARK).read_text(encoding="utf-8"))
        history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        settings = yaml.safe_load((folder / "training.yaml").read_text(encoding="utf-8"))
        with safe_open(folder / "model.safetensors", framework="np") as weights:
            sizes = [math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()]  # noqa: SIM118
        return Training(
            name=folder.name,
            settings=_flat(settings),
            parameters=sum(sizes),
            tokens_read=int(history[-1]["tokens_read"]),
            nll=tuple(map(float, depths["nll"])),
            kl=tuple(map(float, depths["kl"])),
            nll_full=None if depths["nll_full"] is None else float(depths["nll_full"]),
            contracts=bool(depths["contracts"]),
            characters_per_token=float(depths["characters_per_token"]),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{folder}: not a training that can be read ({reason}).") from None
    except SafetensorError as error:
        raise SourceError(f"{folder}: damaged weights ({error}).") from None


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _free(key: str) -> bool:
    return key.split(".")[0] in FREE


def _labels(firsts: Sequence[Training]) -> list[str]:
    """What each is called: its shape, how it was trained, and whatever else tells it apart."""
    said = ("n_layer", "n_embd", "hidden_feedback", "passes", "through_passes", "draw_passes")
    said += ("update_every_pass", "steps")
    keys = sorted({key for one in firsts for key in one.settings if not _free(key)})
    differing = [
        key
        for key in keys
        if key.rpartition(".")[2] not in said
        and len({str(one.settings.get(key)) for one in firsts}) > 1
    ]
    labels = []
    for one in firsts:
        of = {key.rpartition(".")[2]: value for key, value in one.settings.items()}
        words = [f"{of['n_layer']} layers"]
        if one.kl:
            drawn = "D ≤ " if of["draw_passes"] else "D = "
            words.append(f"stateful, {drawn}{of['passes']}")
            words.append("back-propagated" if of["through_passes"] else "detached")
            if of["update_every_pass"]:
                words.append("a step a pass")
        else:
            words.append("plain")
        if len({str(other.settings.get("training.steps")) for other in firsts}) > 1:
            words.append(f"{of['steps']} steps")
        words += [f"{key}={one.settings.get(key)}" for key in differing]
        labels.append(", ".join(words))
    return labels


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.trainings", description="Trained models: loss by depth."
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="model folders, or one of them"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw loss and KL by depth")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="every loss at full precision")
    arguments = parser.parse_args(argv)
    try:
        trainings = load_trainings(arguments.sources)
        groups = grouped(trainings)
        if arguments.csv is not None:
            write_whole(arguments.csv, _rows(groups).to_csv(index=False).encode())
        print(markdown(table(groups)))
        if arguments.out is not None:
            from analysis.figures import write_depths

            words = ["python", "-m", "analysis.trainings", *arguments.sources, "--out", "figures"]
            for path in write_depths(groups, arguments.out, command=shlex.join(words)):
                print(path)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _rows(groups: Sequence[Group]) -> pd.DataFrame:
    rows = [
        {
            "model": group.label,
            "name": one.name,
            "seed": one.settings.get("seed"),
            "parameters": one.parameters,
            "tokens_read": one.tokens_read,
            "trained_depth": one.trained_depth,
            **{f"nll_{depth}": value for depth, value in enumerate(one.nll)},
            "nll_full": one.nll_full,
            **{f"kl_{depth}": value for depth, value in enumerate(one.kl)},
            "contracts": one.contracts if one.kl else None,
        }
        for group in groups
        for one in group.trainings
    ]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    sys.exit(main())
