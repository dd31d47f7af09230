"""What a runner prints at its end, and ``experiments.status`` at any time: how a study stands.

Finished runs as a table, every other one on a line that says why, and the commands that go on.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.sweeps.study import Run, State, Study

# a column's title, and where a run's summary has it
CONVERGENCE = {
    "outcome": "outcome",
    "iterations to tolerance": "iterations_to_tolerance",
    "nll": "nll",
    "nll plain": "nll_plain",
    "effect (KL)": "kl_effect",
}
STATE_TRACKING = {
    "solved level": "solved_level",
    "accuracy (trained)": "accuracy_trained",
    "accuracy (tested)": "accuracy_tested",
}
MOST_ROWS = 40  # of a table on a screen
LONGEST_VALUE = 32  # characters of a setting in a run's name

# settings that name_of speaks of, or that cannot change a result
_SAID = (
    *("feedback.kind", "feedback.strength", "feedback.shift", "feedback.hidden_strength"),
    *("recompute.iterations", "recompute.damping", "recompute.start", "generation.max_new_tokens"),
    *("contestant.", "task.name", "task.target", "study", "runs_dir", "tracking.", "device.name"),
)


def name_of(config: dict[str, Any]) -> str:
    """A run's settings in a few words, for people."""
    if "contestant" in config:
        task = config["task"]
        return f"{contestant_of(config)}; {task['name']}, {task['target']}"
    recompute = config["recompute"]
    words = [feedback_of(config), f"n={recompute['iterations']}"]
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
    sign = "s" if feedback["kind"] == "hidden_state" else "β"
    words = [f"{feedback['kind']} {sign}={feedback['strength']:g}"]
    if feedback.get("hidden_strength"):
        words.append(f"hidden_state s={feedback['hidden_strength']:g}")
    text = " + ".join(words)
    return f"{text} shift=0" if feedback.get("shift") == 0 else text


def contestant_of(config: dict[str, Any]) -> str:
    """What a contestant of state tracking is called in tables and figures."""
    contestant = config["contestant"]
    layers = f"{contestant['layers']} layer{'s' if contestant['layers'] > 1 else ''}"
    longer = f", {contestant['times']} x steps" if contestant["times"] > 1 else ""
    if contestant["passes"] == 1:
        return f"plain, {layers}{longer}"
    how = "through" if contestant["through"] else "detached"
    drawn = " drawn" if contestant["drawn"] else ""
    return f"stateful, {layers}, {contestant['passes']} passes{drawn} {how}{longer}"


def names_of(configs: Sequence[dict[str, Any] | None]) -> list[str]:
    """The same for runs side by side: whatever else differs between them is said too."""
    flat = [_flatten(config) for config in configs]
    differing = [
        key
        for key in dict.fromkeys(key for settings in flat for key in settings)
        if not key.startswith(_SAID)
        and len({repr(settings.get(key)) for settings in flat if settings}) > 1
    ]
    names = []
    for config, settings in zip(configs, flat, strict=True):
        try:
            words = [name_of(config or {})]
        except (KeyError, TypeError, ValueError):  # of another version, or damaged
            words = ["?"]
        words += [_said(key, settings[key]) for key in differing if key in settings]
        names.append(" ".join(words))
    return names


def report(study: Study) -> str:
    """How the study stands, and what to type next."""
    names = names_of([run.config for run in study.runs])
    named = sorted(zip(study.runs, names, strict=True), key=lambda pair: _order(*pair))
    finished = [pair for pair in named if pair[0].state is State.FINISHED]
    others = [pair for pair in named if pair[0].state is not State.FINISHED]
    closing = [study.counts(), *(f"Complete it:  {command}" for command in study.commands())]
    if finished:
        words = [str(study.path), "--out", str(Path("figures") / study.path.name)]
        closing.append(f"Draw it:  {shlex.join(['python', '-m', 'analysis', 'figures', *words])}")
    parts = [_table(finished, study.path), _unfinished(others), "\n".join(closing)]
    return "\n\n".join(filter(None, parts))


def plain_list(study: Study) -> str:
    """Every run with its state, and nothing more: what a sweep would find."""
    names = names_of([run.config for run in study.runs])
    lines = _states(list(zip(study.runs, names, strict=True)))
    return "\n".join([*lines, "", study.counts()])


def _table(finished: list[tuple[Run, str]], path: Path) -> str:
    if not finished:
        return ""
    tracks = any("contestant" in (run.config or {}) for run, _ in finished)
    columns = STATE_TRACKING if tracks else CONVERGENCE
    cut = len(finished) > MOST_ROWS
    half = MOST_ROWS // 2
    rows = [
        [run.shown, name, *(_cell((run.overall or {}).get(key)) for key in columns.values())]
        for run, name in ([*finished[:half], *finished[-half:]] if cut else finished)
    ]
    sides = ["left", "left", *("left" if title == "outcome" else "right" for title in columns)]
    titles = ["run", "settings", *columns]
    lines = _lines(tabulate(rows, titles, "simple", colalign=sides, disable_numparse=True))
    if cut:
        source = shlex.quote(str(path))
        between = f"… {len(finished) - MOST_ROWS} more:  python -m analysis table {source}"
        lines.insert(2 + half, between)
    return "\n".join(lines)


def _unfinished(others: list[tuple[Run, str]]) -> str:
    """Failures first and all of them; of the many that only wait, the first."""
    failed = [pair for pair in others if pair[0].state is State.FAILED]
    waiting = [pair for pair in others if pair[0].state is not State.FAILED]
    lines = _states([*failed, *waiting[:MOST_ROWS]])
    if len(waiting) > MOST_ROWS:
        lines.append(f"… {len(waiting) - MOST_ROWS} more that are not finished")
    return "\n".join(lines)


def _states(named: list[tuple[Run, str]]) -> list[str]:
    rows = [
        [run.shown, name, f"{run.state}: {run.error}" if run.error else str(run.state)]
        for run, name in named
    ]
    return _lines(tabulate(rows, tablefmt="plain", disable_numparse=True))


def _lines(table: str) -> list[str]:
    return [line.rstrip() for line in table.splitlines()]


def _order(run: Run, name: str) -> tuple[float, str]:
    try:
        strength = float((run.config or {})["feedback"]["strength"])
    except (KeyError, TypeError, ValueError):
        strength = 0.0
    return strength, name


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config} if prefix else {}
    flat = [_flatten(inner, f"{prefix}.{name}" if prefix else name)
            for name, inner in config.items()]  # fmt: skip
    return {key: value for part in flat for key, value in part.items()}


def _said(key: str, value: Any) -> str:
    text = "null" if value is None else str(value)
    if len(text) > LONGEST_VALUE:  # of a path, the end tells most
        text = f"…{text[1 - LONGEST_VALUE :]}"
    return f"{key}={text}"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
