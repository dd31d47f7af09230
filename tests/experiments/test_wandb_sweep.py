"""conf/wandb_sweep.yaml: the command line that W&B's agent makes of it runs the same runner."""

import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.forked import Forker

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "conf" / "wandb_sweep.yaml"
CHOSEN = {"feedback.strength": 0.25}  # as a sweep's server would


def command_line() -> list[str]:
    """What W&B's documentation says an agent runs: its words, with the macros filled in."""
    sweep = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    assert set(sweep["parameters"]) == set(CHOSEN)
    words: list[str] = []
    for word in sweep["command"]:
        if word == "${args_no_hyphens}":
            words += [f"{key}={value}" for key, value in CHOSEN.items()]
        else:
            words.append({"${env}": "/usr/bin/env", "python": sys.executable}.get(word, word))
    return words


def test_the_agents_command_line_runs_a_convergence_run(
    settings: list[str], runs: Callable[[], list[Path]], forker: Forker
) -> None:
    small = [word for word in settings if not word.startswith(("study=", "tracking."))]
    words = [*command_line(), *small, "study=s", "tracking.mode=disabled"]
    assert words[:2] == ["/usr/bin/env", sys.executable]
    done = forker.run(words[2:])
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = runs()
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["feedback"]["strength"] == 0.25


def test_the_measure_that_the_sweep_looks_at_is_in_the_summary(
    compute: Callable[..., Path],
) -> None:
    sweep = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    summary = yaml.safe_load((compute() / "summary.json").read_text(encoding="utf-8"))
    assert isinstance(summary["overall"][sweep["metric"]["name"]], float)
