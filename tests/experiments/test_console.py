"""What the runner shows at its end, and that the command it names works."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import Forker

Converge = Callable[..., tuple[int, str, str]]


def test_a_run_ends_with_its_table_and_the_next_command(
    converge: Converge, runs: Callable[[], list[Path]]
) -> None:
    code, out, err = converge()
    assert (code, err) == (0, "")
    lines = out.strip().splitlines()
    header, rule, row = lines[:3]
    for title in ("run", "settings", "outcome", "iterations to tolerance", "nll", "effect (KL)"):
        assert title in header
    assert set(rule) <= {"-", " "}
    assert re.fullmatch(rf"{runs()[0].name}  log_prob β=0.5 n=12  .*  settled", row)
    assert lines[-1] == (
        f"Draw it:  python -m analysis figures {runs()[0].parent} --out {Path('figures/s')}"
    )


def test_a_sweep_ends_with_all_runs_of_its_study_and_a_command_that_draws_them(
    in_process: Converge, settings: list[str], converge: Converge, forker: Forker, tmp_path: Path
) -> None:
    converge("feedback=none", "prompts.limit=2", "prompts.max_tokens=12")  # an earlier one
    code, out, err = in_process(
        "converge", "-m", *settings, "prompts.max_tokens=20", "feedback.strength=1,-1,0"
    )
    assert (code, err) == (0, "")
    table = [line for line in out.splitlines() if re.match(r"[0-9a-f]{10}  ", line)]
    assert len(table) == 4
    assert [re.search(r"β=(-?\d)|no feedback", line)[0] for line in table] == [  # type: ignore
        "β=-1", "β=0", "no feedback", "β=1",
    ]  # fmt: skip

    (command,) = re.findall(r"^Draw it:  (.*)$", out, re.MULTILINE)
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "analysis", "figures"]
    done = forker.run(words[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = sorted(path.name for path in (tmp_path / "figures" / "s").glob("*.png"))
    assert "headline.png" in drawn
    assert "Traceback" not in done.stderr


def test_a_name_that_a_shell_would_split_is_quoted(converge: Converge, tmp_path: Path) -> None:
    code, out, _ = converge(f"runs_dir='{tmp_path / 'my runs'}'")
    assert code == 0
    (command,) = re.findall(r"^Draw it:  (.*)$", out, re.MULTILINE)
    assert shlex.split(command)[4] == str(tmp_path / "my runs" / "s")


def test_standard_output_and_error_are_plain_text_in_a_pipe(converge: Converge) -> None:
    _, out, err = converge("feedback.strength=2")
    assert err == "", "no progress bar where nobody watches"
    assert "\r" not in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("feedback=", "feedback=logit"), ("recompute.iter", "recompute.iterations=")],
)
def test_the_tab_key_completes_settings(typed: str, offered: str, forker: Forker) -> None:
    script = "from experiments.converge.__main__ import main; main()"
    line = {"COMP_LINE": f"stateful-gpt-converge {typed}"}
    done = forker.run(["-c", script, "-sc", "query=bash"], env={**os.environ, **line})
    assert done.returncode == 0, done.stderr
    assert offered in done.stdout.split()
