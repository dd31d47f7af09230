"""The loading benchmark reads what it wrote, all of it, and says so in numbers."""

import json
import sys
from pathlib import Path

import pytest

from scripts.benchmark import load as benchmark_load


def test_every_row_of_every_run_is_read_and_counted(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--runs", "3", "--rows", "1000", "--json"]
    monkeypatch.setattr(sys, "argv", ["benchmark_load", *words])
    assert benchmark_load.main() == 0
    out, err = capfd.readouterr()
    assert err == ""
    found = json.loads(out.splitlines()[-1])
    assert (found["runs"], found["rows"]) == (3, 3000)
    assert 0 < found["frames_seconds"] + found["trajectories_seconds"] <= found["seconds"] * 1.001
    assert found["peak_bytes"] > 2**20


@pytest.mark.parametrize("words", [["--runs", "0"], ["--rows", "-5"], ["--rows", "many"]])
def test_a_count_that_is_none_is_one_sentence(
    words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_load", *words])
    with pytest.raises(SystemExit, match="2"):
        benchmark_load.main()
    assert "must be a whole number of at least 1" in capfd.readouterr().err


def test_runs_are_whole_and_of_about_the_asked_size(tmp_path: Path) -> None:
    assert benchmark_load.write_runs(tmp_path, runs=2, rows=2500) == 2 * 2500
    assert benchmark_load.measure(tmp_path)["rows"] == 5000
