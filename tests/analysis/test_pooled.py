"""Repeats of one setting as one: their intervals, and their rows in the table and on the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import load
from analysis.__main__ import main
from analysis.draw.strength import headline
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


def test_what_diverged_has_no_interval_of_the_tokens_that_it_left_alone(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for strength in (0.5, 1.0, 9.0):
        run = make_run(tmp_path / f"r{strength:g}", prompts=ONE, feedback__strength=strength)
    trajectory = pd.read_parquet(run / "trajectory.parquet")
    diverged = (trajectory["iteration"] > 1) & (trajectory["position"] > 1)
    trajectory["log_prob"] = trajectory["log_prob"].mask(diverged)
    trajectory.to_parquet(run / "trajectory.parquet")
    runs = load(str(tmp_path))
    kept = runs.runs.index[runs.runs["strength"] < 9]
    assert [*paired(runs.estimates, runs.runs["group"])] == [*runs.runs.loc[kept, "group"]]


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
    assert {one.over for one in together.values()} == {"24 tokens of 3 texts", "10 texts"}
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


def test_the_change_over_all_prompts_is_of_those_that_have_both_losses(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(study / "run_0p5", tmp_path / "s" / "a"))
    summary = json.loads((run / "summary.json").read_text())
    first, diverged, last = summary["prompts"]
    diverged |= {"nll": None, "outcome": "diverged"}
    summary["overall"]["nll"] = (first["nll"] + last["nll"]) / 2  # as a run writes it
    (run / "summary.json").write_text(json.dumps(summary))
    trajectory = pd.read_parquet(run / "trajectory.parquet")
    end = (trajectory["prompt_id"] == "rain") & (trajectory["iteration"] == 40)
    # nothing that is fed back reaches the first tokens
    trajectory.loc[end & (trajectory["position"] > 2), "log_prob"] = np.nan
    trajectory.to_parquet(run / "trajectory.parquet")
    expected = np.mean([one["nll"] - one["nll_plain"] for one in (first, last)])
    runs = load(str(tmp_path))
    assert runs.runs["change"].item() == pytest.approx(expected)
    (interval,) = paired(runs.estimates, runs.runs["group"]).values()
    assert interval.mean == pytest.approx(expected)
    assert main(["table", str(tmp_path)]) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if "overall" in line]
    assert row[-3] == f"{expected:+.4f}".replace("-", "−")
    assert len(paired(runs.estimates, runs.runs["group"], by_prompt=True)) == 2
    place = [column["key"] for column in data_of(build(runs))["columns"]].index("change")
    assert data_of(build(runs))["rows"][0]["measures"][place] == pytest.approx(expected)


def test_seeds_that_diverged_weigh_no_text_more_than_another(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"a": TEXTS["rain"], "b": TEXTS["list"]}
    for seed in (0, 1, 2):
        run = make_run(tmp_path / f"r{seed}", prompts=texts, feedback__strength=0.5, seed=seed)
    summary = json.loads((run / "summary.json").read_text())
    diverged, other = summary["prompts"]
    own, _ = changes = [one["nll"] - one["nll_plain"] for one in (diverged, other)]
    expected, nll = np.mean(changes), diverged["nll"]
    diverged |= {"nll": None, "outcome": "diverged"}
    summary["overall"] |= {"nll": other["nll"], "outcome": "diverged"}
    (run / "summary.json").write_text(json.dumps(summary))
    trajectory = pd.read_parquet(run / "trajectory.parquet")
    end = (trajectory["prompt_id"] == "a") & (trajectory["iteration"] > 2)
    trajectory["log_prob"] = trajectory["log_prob"].mask(end & (trajectory["position"] > 2))
    trajectory.to_parquet(run / "trajectory.parquet")
    runs = load(str(tmp_path))
    (interval,) = paired(runs.estimates, runs.runs["group"]).values()
    assert interval.mean == pytest.approx(expected)
    assert main(["table", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (of_text,) = [line for line in lines if "a" in line]  # the seeds that did not diverge
    assert of_text[-4:-2] == [f"{nll:.4f}", f"{own:+.4f}".replace("-", "−")]
    (row,) = [line for line in lines if "overall" in line]
    assert row[-3:-1] == [f"{expected:+.4f}".replace("-", "−"), f"{interval.half:.4f}"]
    page = data_of(build(runs))
    place = [column["key"] for column in page["columns"]].index("change")
    assert page["rows"][0]["measures"][place] == pytest.approx(expected)


def test_runs_that_read_other_texts_from_a_file_of_one_name_are_not_pooled(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"prompts__source": "file", "prompts__file": "x.jsonl"}
    for strength in (0.5, 1.0):
        for name, text in (("a", "one two three"), ("b", "one two three"), ("c", "four five")):
            folder = tmp_path / f"{name}{strength}"
            make_run(folder, prompts={"p": text}, feedback__strength=strength, **changes)
    runs = load(str(tmp_path))
    assert list(runs.runs["group"]) == [0, 0, 1, 2, 2, 3]
    assert list(runs.runs["variant"]) == ["texts 1", "texts 1", "texts 2"] * 2
    assert runs.runs["label"].nunique() == 6
    assert main(["table", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "overall" in line]
    assert [row[:4] for row in rows] == [
        ["0.5", "2", "overall", "3"],
        ["1", "2", "overall", "3"],
        ["0.5", "1", "overall", "2"],
        ["1", "1", "overall", "2"],
    ]
    panels = [axes.get_title(loc="left") for axes in headline(runs).axes]
    assert panels == ["texts 1", "texts 2", "", ""]


def test_runs_of_a_model_that_was_trained_again_are_not_pooled_with_those_before(
    make_run: MakeRun, tmp_path: Path
) -> None:
    changes = {"model__path": "models/mine"}
    for name, content in (("a", None), ("b", "one"), ("c", "one"), ("d", "two")):
        status = make_run(tmp_path / name, **changes) / "status.json"
        if content is not None:  # of runs from before it was kept, nothing is known
            told = json.loads(status.read_text()) | {"model_hash": content}
            status.write_text(json.dumps(told))
    runs = load(str(tmp_path))
    assert list(runs.runs["group"]) == [0, 0, 0, 1]
    assert list(runs.runs["variant"]) == ["weights 1"] * 3 + ["weights 2"]
    page = data_of(build(runs))
    assert page["settings"] == ["weights"]
    assert [run["settings"] for run in page["runs"]] == [["1"]] * 3 + [["2"]]


def test_a_curve_over_strengths_is_of_one_text(make_run: MakeRun, tmp_path: Path) -> None:
    for strength, text in ((0.5, "one two"), (1.0, "one two"), (2.0, "one two three")):
        make_run(tmp_path / f"r{strength}", prompts={"p": text}, feedback__strength=strength)
    assert list(load(str(tmp_path)).runs["variant"]) == ["texts 1", "texts 1", "texts 2"]


def test_a_number_is_of_the_same_texts_whatever_is_fed_back(
    make_run: MakeRun, tmp_path: Path
) -> None:
    texts = {"a": "one two", "b": "one two three", "c": "four five"}
    for kind, names in (("log_prob", "ab"), ("prob", "bc")):
        for name in names:
            changes = {"feedback__kind": kind, "feedback__strength": 0.5}
            make_run(tmp_path / f"{kind}_{name}", prompts={"p": texts[name]}, **changes)
    variants = list(load(str(tmp_path)).runs["variant"])
    assert variants == ["log_prob, texts 1", "log_prob, texts 2", "prob, texts 2", "prob, texts 3"]
