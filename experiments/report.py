"""What a runner prints at its end: the runs of a study as a table, from their summaries."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.files import read_json
from experiments.run_folder import CONFIG, STATUS, SUMMARY
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


def table(study: Path) -> str:
    """All runs of a study folder; those without results say why."""
    rows = []
    for status_file in sorted(study.glob(f"*/{STATUS}")):
        folder = status_file.parent
        status = read_json(status_file)
        try:
            config = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
            name, strength = name_of(config), config["feedback"]["strength"]  # type: ignore
        except (OSError, KeyError, TypeError, ValueError):
            name, strength = "?", 0.0
        state = status.get("state") if isinstance(status, dict) else "unreadable"
        summary = read_json(folder / SUMMARY)
        if state == "finished" and isinstance(summary, dict):
            run = summary["overall"]
            cells = [
                run["outcome"],
                _number(run["iterations_to_tolerance"]),
                _number(run["nll"]),
                _number(run["nll_plain"]),
                _number(run["kl_effect"]),
            ]
        else:
            error = status.get("error") if isinstance(status, dict) else None
            cells = [f"{state}: {error}" if error else str(state), "–", "–", "–", "–"]
        rows.append((strength, name, [folder.name, name, *cells]))
    rows.sort(key=lambda row: row[:2])
    return _aligned([[title for title, _ in COLUMNS], *(cells for _, _, cells in rows)])


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if side == "<" else cell.rjust(width)
            for cell, width, (_, side) in zip(row, widths, COLUMNS, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)
