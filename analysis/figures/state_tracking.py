"""Accuracy of state-tracking contestants, by level of the word and by depth of the recurrence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.drawing import Drawing
from analysis.figures.style import DASHES, DISTINCT, INK, QUIET, SETTINGS, Pen, count_axis, sheet
from analysis.state_tracking import Contestant, Run, by_contestant, by_question

# one hue, light to dark: the depth of plain models is an order
PLAIN = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
MARKERS = "os^Dvp"
TARGETS = {"state": "the state is said", "half": "only its half is said"}


def drawings(runs: Sequence[Run]) -> Iterator[Drawing]:
    with matplotlib.rc_context(SETTINGS):
        for target in dict.fromkeys(target for _, target in by_question(runs)):
            chosen = [run for run in runs if run.target == target]
            yield _by_level(chosen, target)
            if any(run.contestant.stateful for run in chosen):
                yield _by_depth([run for run in chosen if run.contestant.stateful], target)


def _by_level(runs: Sequence[Run], target: str) -> Drawing:
    questions = by_question(runs)
    figure, axes = sheet(
        title=f"Accuracy by level of the word, where {TARGETS.get(target, target)}",
        caption=(
            "Level: symbols read since the start of the word. Lines: mean over seeds at full"
            f" recurrence; bands: least to most. {_seeds(runs)} The dashed vertical line is the"
            " longest trained word, the dotted horizontal line is chance."
        ),
        width=11.0,
        height=2.2 + 2.9 * len(questions),
        rows=len(questions),
        columns=2,
    )
    names: dict[bool, dict[Contestant, Pen]] = {
        stateful: _pens(sorted({r.contestant for r in runs if r.contestant.stateful == stateful}))
        for stateful in (False, True)
    }
    for row, ((task, _), group) in enumerate(questions.items()):
        for column, stateful in enumerate((False, True)):
            panel = axes[row][column]
            panel.set_title(f"{task}: {'stateful' if stateful else 'plain'} models")
            _frame(panel, group[0])
            for contestant, same in by_contestant(group).items():
                if contestant.stateful == stateful:
                    table = np.array([run.at_full_depth().to_numpy() for run in same])
                    levels = np.arange(1, table.shape[1] + 1)
                    _line(panel, levels, table, names[stateful][contestant], contestant)
            panel.axvline(group[0].trained_level, color=QUIET, linewidth=1.0, linestyle="dashed")
            count_axis(panel, 1, group[0].tested_level, label="Level (symbols read)")
    _legends(axes)
    return _drawing(f"accuracy_{target}", figure, runs)


def _by_depth(runs: Sequence[Run], target: str) -> Drawing:
    questions = by_question(runs)
    figure, axes = sheet(
        title=f"Accuracy by depth of the recurrence, where {TARGETS.get(target, target)}",
        caption=(
            "Depth: passes fed with the hidden states of the pass before. Accuracy is the mean over"
            f" all levels. Lines: mean over seeds; bands: least to most. {_seeds(runs)} A larger"
            " mark stands at the depth of the last training pass; the dotted horizontal line is"
            " chance."
        ),
        width=11.0,
        height=3.6 + 0.4 * len({r.contestant for r in runs}) / 2,
        rows=1,
        columns=len(questions),
    )
    names = _pens(sorted({run.contestant for run in runs}))
    for column, ((task, _), group) in enumerate(questions.items()):
        panel = axes[0][column]
        panel.set_title(f"{task}: stateful models")
        _frame(panel, group[0])
        for contestant, same in by_contestant(group).items():
            table = np.array(
                [run.accuracy.groupby("depth")["accuracy"].mean().to_numpy() for run in same]
            )
            depths = np.arange(table.shape[1])
            pen = names[contestant]
            _line(panel, depths, table, pen, contestant)
            trained = contestant.passes - 1
            if trained < len(depths):
                panel.plot(
                    trained,
                    table.mean(axis=0)[trained],
                    marker="o",
                    markersize=8,
                    color=pen.colour,
                    markeredgecolor="white",
                )
        panel.set_ylabel("Accuracy, mean over levels")
        count_axis(panel, 0, group[0].tested_level - 1, label="Depth (passes with feedback)")
    _legends(axes)
    return _drawing(f"depth_{target}", figure, runs)


def _pens(contestants: Sequence[Contestant]) -> dict[Contestant, Pen]:
    """Plain: one hue by layers. Stateful: a colour by passes and layers, dashed if detached."""
    kinds = list(dict.fromkeys((c.layers, c.passes, c.drawn) for c in contestants))
    pens = {}
    for contestant in contestants:
        if contestant.stateful:
            place = kinds.index((contestant.layers, contestant.passes, contestant.drawn))
            pens[contestant] = Pen(
                DISTINCT[place % len(DISTINCT)], DASHES[0 if contestant.through else 1]
            )
        else:
            longer = contestant.times > 1
            shade = PLAIN[min(contestant.layers, len(PLAIN)) - 1]
            pens[contestant] = Pen(DISTINCT[1] if longer else shade, DASHES[2 if longer else 0])
    return pens


def _line(panel: Axes, x: np.ndarray, table: np.ndarray, pen: Pen, contestant: Contestant) -> None:
    name = contestant.name.partition(", ")[2]
    marker = "" if contestant.stateful else MARKERS[(contestant.layers - 1) % len(MARKERS)]
    panel.fill_between(
        x, table.min(axis=0), table.max(axis=0), color=pen.colour, alpha=0.13, linewidth=0
    )
    panel.plot(
        x,
        table.mean(axis=0),
        color=pen.colour,
        linestyle=pen.dash,
        marker=marker,
        markersize=3.5,
        label=name,
    )


def _frame(panel: Axes, run: Run) -> None:
    panel.set_ylim(0.0, 1.03)
    panel.set_ylabel("Accuracy")
    panel.axhline(run.chance, color=INK, linewidth=1.0, linestyle="dotted")


def _legends(axes: np.ndarray) -> None:
    """Below each panel of the last row, the names in it and above it that stand nowhere else."""
    seen: set[str] = set()
    for column in axes.T:
        names = {}
        for panel in column:
            handles, labels = panel.get_legend_handles_labels()
            names |= {label: handle for label, handle in zip(labels, handles, strict=True)}
        names = {label: handle for label, handle in names.items() if label not in seen}
        seen |= set(names)
        if names:
            column[-1].legend(
                names.values(),
                names.keys(),
                loc="upper left",
                bbox_to_anchor=(0.0, -0.2),
                ncols=2,
                fontsize=7.5,
            )


def _seeds(runs: Sequence[Run]) -> str:
    counts = sorted(
        {len(same) for g in by_question(runs).values() for same in by_contestant(g).values()}
    )
    text = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Runs behind a line: {text}."


def _drawing(name: str, figure: Figure, runs: Sequence[Run]) -> Drawing:
    title = figure.get_suptitle()
    return Drawing(name, title, figure, tuple(run.run_id for run in runs))
