"""What a runner prints at its end, and ``experiments.status`` at any time: how a study stands.

One table of all runs with what became of each, and the commands that go on.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.sweeps.study import Run, State, Study, ours
from stateful_gpt.console import cut

# a column's title, and where a run's summary has it
CONVERGENCE = {
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
MOST_ROWS = 40  # of one kind in a table on a screen
LONGEST = 1_000  # characters of a run's settings, or of why it failed
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
    text = f"{feedback['kind']} {sign}={feedback['strength'] + 0.0:g}"  # -0.0 is 0.0
    if feedback.get("hidden_strength"):
        text += f" + hidden_state s={feedback['hidden_strength']:g}"
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
        except (KeyError, TypeError, ValueError, OverflowError):  # of another version, or damaged
            words = ["?"]
        if settings.get("generation.seed") == settings.get("seed"):  # as it is unless it is set
            settings.pop("generation.seed", None)
        for key in differing:
            if key in settings:
                text = "null" if settings[key] is None else str(settings[key])
                # of a path, the end tells most
                end = text if len(text) <= LONGEST_VALUE else f"…{text[1 - LONGEST_VALUE :]}"
                words.append(f"{key}={end}")
        names.append(cut(" ".join(words), LONGEST))
    return names


def report(study: Study) -> str:
    """How the study stands, and what to type next."""
    closing = [f"Complete it:  {command}" for command in study.commands()]
    stored = [*(plan.command for plan in study.plans), *(run.command for run in study.runs)]
    if not (closing or study.complete) and None in map(ours, filter(None, stored)):
        closing = ["The command of this sweep has settings that are not repeated here"]
    if any(run.state is State.FINISHED for run in study.runs):
        words = [str(study.path), "--out", str(Path("figures") / study.path.resolve().name)]
        closing.append(f"Draw it:  {shlex.join(['python', '-m', 'analysis', 'figures', *words])}")
    return "\n".join([table(study), *closing])


def table(study: Study) -> str:
    """Every run with what became of it, and how many there are of each kind.

    Finished runs come first, in the order of their strength, then all that failed; of many that are
    finished or wait, the first.
    """

    def order(pair: tuple[Run, str]) -> tuple[float, str]:
        strength = _flatten(pair[0].config).get("feedback.strength")
        return strength if isinstance(strength, (int, float)) else 0.0, pair[1]

    names = names_of([run.config for run in study.runs])
    named = sorted(zip(study.runs, names, strict=True), key=order)
    finished = [pair for pair in named if pair[0].state is State.FINISHED]
    failed = [pair for pair in named if pair[0].state is State.FAILED]
    waiting = [pair for pair in named if pair[0].state not in (State.FINISHED, State.FAILED)]
    tracks = any("contestant" in (run.config or {}) for run, _ in finished)
    columns = (STATE_TRACKING if tracks else CONVERGENCE) if finished else {}
    rows = [
        [
            *(run.shown, name),
            *(_cell(run.overall.get(key)) if run.overall else "" for key in columns.values()),
            outcome_of(run),
        ]
        for run, name in [*finished[:MOST_ROWS], *failed, *waiting[:MOST_ROWS]]
    ]
    titles = ["run", "settings", *columns, "outcome"]
    sides = ["left", "left", *["right"] * len(columns), "left"]
    text = tabulate(rows, titles, "simple", colalign=sides, disable_numparse=True)
    lines = [line.rstrip() for line in text.splitlines()]
    if len(finished) > MOST_ROWS:
        source = shlex.quote(str(study.path))
        more = len(finished) - MOST_ROWS
        lines.append(f"… {more} more:  python -m analysis table {source}")
    if len(waiting) > MOST_ROWS:
        lines.append(f"… {len(waiting) - MOST_ROWS} more that are not finished")
    return "\n".join([*lines, "", study.counts()])


def outcome_of(run: Run) -> str:
    """How the estimates of a finished run ended; of any other, its state and the reason."""
    if run.state is State.FINISHED:
        return cut((run.overall or {}).get("outcome", run.state))
    return cut(f"{run.state}: {run.error}", LONGEST) if run.error else str(run.state)


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config} if prefix else {}
    flat: dict[str, Any] = {}
    for name, inner in config.items():
        flat |= _flatten(inner, f"{prefix}.{name}" if prefix else name)
    return flat


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else cut(value, LONGEST_VALUE)
