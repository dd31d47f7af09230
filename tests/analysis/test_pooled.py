"""Repeats of one setting as one: their intervals, and their rows in the table and on the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis import load
from analysis.__main__ import main
from analysis.intervals import paired
from analysis.page.build import build
from tests.analysis.conftest import TEXTS
from tests.analysis.test_page import data_of

MakeRun = Callable[..., Path]
ONE = {"p": "one two three four five six"}


def test_the_interval_of_a_change_is_paired_token_by_token(study: Path) -> None:
    runs = load(str(study))
    strong = runs.runs.index[runs.runs["strength"] == 0.5]
    (interval,) = paired(runs.estimates, runs.runs.loc[strong, "group"]).values()
    rows = runs.prompts[runs.prompts["run"].isin(strong)]
    assert interval.mean == pytest.approx((rows["nll"] - rows["nll_plain"]).mean())
    assert interval.low < interval.mean < interval.high
    assert interval.over == f"{int((rows['prompt_tokens'] - 1).sum())} tokens of 3 texts"


def test_intervals_taken_together_are_those_taken_one_by_one(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = TEXTS["rain"].split()
    for strength in (0.5, 1.0):
        for count in (3, 10):  # texts: tokens are resampled, and texts
            texts = {f"p{n}": " ".join((words[n:] + words)[: 8 + n % 3]) for n in range(count)}
            for seed in (0, 1):
                name = f"{strength}_{count}_{seed}"
                changes = {"feedback__strength": strength, "prompts__limit": count, "seed": seed}
                make_run(tmp_path / "s" / name, prompts=texts, **changes)
    runs = load(str(tmp_path / "s"))
    groups, estimates = runs.runs["group"], runs.estimates
    together = paired(estimates, groups)
    assert len(together) == 4
    for group, interval in together.items():
        assert paired(estimates, groups[groups == group]) == {group: interval}
    begun: list[int] = []
    begin = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: begun.append(seed) or begin(seed))
    single = paired(estimates, groups, by_prompt=True)
    assert len(single) == 2 * (3 + 10)
    assert len(begun) == 3, "texts of one length share what is drawn"
    for (group, prompt), interval in single.items():
        rows = estimates[estimates["prompt_id"] == prompt]
        assert paired(rows, groups[groups == group]) == {group: interval}


def test_seeds_and_repeats_of_one_setting_are_pooled(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1, 2):
        make_run(tmp_path / f"a{seed}", prompts=ONE, feedback__strength=0.5, seed=seed)
    make_run(tmp_path / "b", prompts=ONE, feedback__strength=-0.5)
    runs = load(str(tmp_path))
    assert list(runs.runs["group"]) == [0, 1, 1, 1]
    assert list(runs.runs["label"])[1:] == [f"β = 0.5, seed {seed}" for seed in (0, 1, 2)]
    assert main(["table", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows if row[2:3] == ["overall"]] == [
        ["−0.5", "1", "overall"],
        ["0.5", "3", "overall"],
    ]
    data = data_of(build(runs))
    assert [
        (row["count"], run["row"]) for run in data["runs"] for row in [data["rows"][run["row"]]]
    ] == [
        (1, 0),
        *[(3, 1)] * 3,
    ]
    assert [data["settings"], data["seeds"]] == [["seed"], [True]]
    losses = [
        json.loads((tmp_path / f"a{seed}/summary.json").read_text())["overall"]["nll"]
        for seed in (0, 1, 2)
    ]
    assert data["rows"][1]["measures"][4] == pytest.approx(np.mean(losses))
    half = paired(runs.estimates, runs.runs["group"])[1].half
    assert data["rows"][1]["measures"][6] == pytest.approx(half)
    assert "in 1 of 2 settings" in data["finding"] or "In none of 2 settings" in data["finding"]
