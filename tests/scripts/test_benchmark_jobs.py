"""The job benchmark runs real sweeps and says what they cost beside their models."""

import json
import sys

import pytest

from scripts.benchmark import jobs as benchmark_jobs


@pytest.mark.slow
def test_a_run_has_a_cost_beside_its_model_with_and_without_wandb(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_jobs, "FEW", 1)
    monkeypatch.setattr(benchmark_jobs, "MANY", 5)
    monkeypatch.setattr(sys, "argv", ["benchmark_jobs", "--json"])
    assert benchmark_jobs.main() == 0
    out, err = capfd.readouterr()
    assert err == ""
    found = json.loads(out.splitlines()[-1])
    assert [row["key"] for row in found["rows"]] == ["job_seconds_disabled", "job_seconds_offline"]
    for row in found["rows"]:
        assert found[row["key"]] == row["value"]
        assert row["low"] <= row["value"] <= row["high"]


def test_a_sweep_that_fails_is_one_sentence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_jobs, "WORDS", "prompts.limit=0")
    monkeypatch.setattr(sys, "argv", ["benchmark_jobs"])
    assert benchmark_jobs.main() == 1
    assert "error: a sweep failed: error: prompts.limit" in capfd.readouterr().err
