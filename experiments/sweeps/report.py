"""What a runner prints at its end, and ``experiments.status`` at any time: how a study stands.

Finished runs as a table, every other one on a line that says why, and the commands that go on.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.sweeps.study import Run, State, Study
from stateful_gpt.feedback import HIDDEN_STATE

COLUMNS = (
    ("run", "<"),
    ("settings", "<"),
    ("outcome", "<"),
    ("iterations to tolerance", ">"),
    ("nll", ">"),
    ("nll plain", ">"),
    ("effect (KL)", ">"),
)
MOST_ROWS = 40  # of a table on a screen
LONGEST_VALUE = 32  # characters of a setting in a run's name

# settings that name_of speaks of, or that cannot change a result
_SAID = {
    ("feedback", "kind"),
    ("feedback", "strength"),
    ("feedback", "shift"),
    ("feedback", "hidden_strength"),
    ("recompute", "iterations"),
    ("recompute", "damping"),
    ("recompute", "start"),
    ("generation", "max_new_tokens"),
    ("study",),
    ("runs_dir",),
    ("tracking",),
    ("device", "name"),
}


def name_of(config: dict[str, Any]) -> str:
    """A run's settings in a few words, for people."""
    recompute = config["recompute"]
    words = [feedback_of(config)]
    words.append(f"n={recompute['iterations']}")
    if recompute["damping"] != 1:
        words.append(f"damping={recompute['damping']:g}")
    if recompute["start"] != "cold":
        words.append(recompute["start"])
    if config["generation"]["max_new_tokens"]:
        words.append(f"+{config['generation']['max_new_tokens']} tokens")
    return " ".join(words)


def feedback_of(config: dict[str, Any]) -> str:
    """What is fed back, and how strongly."""
    feedback = config["feedback"]
    if feedback["kind"] == "none":
        return "no feedback"
    sign = "s" if feedback["kind"] == HIDDEN_STATE else "β"
    words = [f"{feedback['kind']} {sign}={feedback['strength']:g}"]
    if feedback.get("hidden_strength"):
        words.append(f"{HIDDEN_STATE} s={feedback['hidden_strength']:g}")
    text = " + ".join(words)
    return f"{text} shift=0" if feedback.get("shift") == 0 else text


def names_of(configs: Sequence[dict[str, Any] | None]) -> list[str]:
    """The same for runs side by side: whatever else differs between them is said too."""
    flat = [_flatten(config) if config is not None else {} for config in configs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    differing = [
        key
        for key in keys
        if not any(key[: len(said)] == said for said in _SAID)
        and len({repr(settings.get(key)) for settings in flat if settings}) > 1
    ]
    names = []
    for config, settings in zip(configs, flat, strict=True):
        try:
            words = ["?" if config is None else name_of(config)]
        except (KeyError, TypeError, ValueError):  # of another version, or damaged
            words = ["?"]
        names.append(" ".join(words + [_said(key, settings[key]) for key in differing
                                       if key in settings]))  # fmt: skip
    return names


def report(study: Study) -> str:
    """How the study stands, and what to type next."""
    names = names_of([run.config for run in study.runs])
    named = sorted(zip(study.runs, names, strict=True), key=lambda pair: _order(*pair))
    finished = [pair for pair in named if pair[0].state is State.FINISHED]
    parts = []
    if finished:
        parts.append(_table(finished, study.path))
    others = [pair for pair in named if pair[0].state is not State.FINISHED]
    if others:
        parts.append(_unfinished(others))
    closing = [study.counts()] if study.runs else [f"{study.path} holds no run"]
    closing += [f"Complete it:  {command}" for command in study.commands()]
    if finished:
        figures = shlex.quote(str(Path("figures") / study.path.name))
        source = shlex.quote(str(study.path))
        closing.append(f"Draw it:  python -m analysis figures {source} --out {figures}")
    return "\n\n".join([*parts, "\n".join(closing)])


def plain_list(study: Study) -> str:
    """Every run with its state, and nothing more: what a sweep would find."""
    names = names_of([run.config for run in study.runs])
    rows = [
        [run.run_id or "–", name, _state(run)] for run, name in zip(study.runs, names, strict=True)
    ]
    return "\n".join([*_aligned(rows, "<<<"), "", study.counts()])


def _table(finished: list[tuple[Run, str]], path: Path) -> str:
    rows = []
    for run, name in finished:
        overall = run.overall or {}
        rows.append([
            run.run_id or "–",
            name,
            str(overall.get("outcome", "?")),
            *(_number(overall.get(key)) for key in
              ("iterations_to_tolerance", "nll", "nll_plain", "kl_effect")),
        ])  # fmt: skip
    cut = len(rows) > MOST_ROWS
    half = MOST_ROWS // 2
    shown = [*rows[:half], *rows[-half:]] if cut else rows
    titles = [title for title, _ in COLUMNS]
    lines = _aligned([titles, *shown], "".join(side for _, side in COLUMNS))
    widths = [max(len(row[i]) for row in [titles, *shown]) for i in range(len(COLUMNS))]
    lines.insert(1, "  ".join("─" * width for width in widths))
    if cut:
        source = shlex.quote(str(path))
        between = f"… {len(rows) - MOST_ROWS} more:  python -m analysis table {source}"
        lines.insert(2 + half, between)
    return "\n".join(lines)


def _unfinished(others: list[tuple[Run, str]]) -> str:
    """Failures first and all of them; of the many that only wait, the first."""
    failed = [pair for pair in others if pair[0].state is State.FAILED]
    waiting = [pair for pair in others if pair[0].state is not State.FAILED]
    shown = [*failed, *waiting[:MOST_ROWS]]
    lines = _aligned([[run.run_id or "–", name, _state(run)] for run, name in shown], "<<<")
    if len(waiting) > MOST_ROWS:
        lines.append(f"… {len(waiting) - MOST_ROWS} more that are not finished")
    return "\n".join(lines)


def _state(run: Run) -> str:
    return f"{run.state}: {run.error}" if run.error else str(run.state)


def _order(run: Run, name: str) -> tuple[float, str]:
    try:
        strength = float((run.config or {})["feedback"]["strength"])
    except (KeyError, TypeError, ValueError):
        strength = 0.0
    return strength, name


def _flatten(config: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    return {key: value for name, inner in config.items()
            for key, value in _flatten(inner, (*prefix, str(name))).items()}  # fmt: skip


def _said(key: tuple[str, ...], value: Any) -> str:
    text = "null" if value is None else str(value)
    if len(text) > LONGEST_VALUE:  # of a path, the end tells most
        text = f"…{text[1 - LONGEST_VALUE :]}"
    return f"{'.'.join(key)}={text}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _aligned(rows: list[list[str]], sides: str) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    return [
        "  ".join(
            cell.ljust(width) if side == "<" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ).rstrip()
        for row in rows
    ]
