"""The W&B workspace as code: what it shows, and what is said where it cannot be saved."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.converge.publish import AGGREGATES
from scripts import make_dashboard
from tests.forked import Forker

Called = tuple[int, str, str]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Called]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)

    def run(*words: str) -> Called:
        monkeypatch.setattr(sys, "argv", ["make_dashboard", *words])
        code = make_dashboard.main()
        return code, *capsys.readouterr()

    return run


def test_the_dashboard_shows_curves_front_response_page_and_runs(
    call: Callable[..., Called],
) -> None:
    code, out, err = call("--print", "--study", "mine")
    assert (code, err) == (0, "")
    made = json.loads(out)
    panels: dict[str, list[dict[str, Any]]] = {
        one["name"]: one["panels"] for one in made["sections"]
    }
    curves = panels["How the estimates settle, by strength"] + panels["The settled front"]
    for curve in curves:
        assert curve["x"] == "iteration"
        assert set(curve["y"]) <= set(AGGREGATES)
        assert curve["groupby"] == {"name": "feedback.strength"}
    assert curves[0]["log_y"] is True
    responses = panels["Response to strength"]
    assert all(one["x"] == {"name": "feedback.strength"} for one in responses)
    page, tokens = panels["Tokens"]
    assert page["media_keys"] == ["page"]
    assert tokens["query"] == {"summaryTable": {"tableKey": "token_trajectories_table"}}
    (runs,) = panels["Table of runs"]
    assert runs["diff_only"] == "split"
    assert "mine" in made["runset_settings"]["filters"]


def test_without_a_login_it_is_one_sentence(tmp_path: Path, forker: Forker) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}

    def call(*words: str, **more: str) -> Called:
        env = {**environment, "HOME": str(tmp_path), **more}
        done = forker.run(["-m", "scripts.make_dashboard", *words], env=env)
        return done.returncode, done.stdout, done.stderr

    assert call("--entity", "team") == (
        1,
        "",
        "error: the dashboard cannot be saved: there is no API key (wandb login makes one known)\n",
    )
    code, _, err = call("--entity", "team", WANDB_API_KEY="short")
    assert (code, err[:45]) == (1, "error: W&B says: WANDB_API_KEY invalid: API k")
    assert err.count("\n") == 1
    assert call()[2] == "error: --entity must name the W&B user or team whose project it is\n"
