"""The printed passes are the recorded ones, down to the first from which nothing moves."""

import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.runs import Grid
from scripts import print_passes

GRID = Grid(
    step=0,
    iterations=np.array([1, 2, 3, 4]),
    positions=np.array([0, 1, 2]),
    tokens=("<|endoftext|>", "a", "<|endoftext|>"),
    log_prob=np.array(
        [[0.0, 0.0, 0.0, 0.0], [-1.5, -2.0, -2.0, -2.0], [-0.25, -0.75, -0.5, -0.5004]]
    ),
)


@pytest.mark.parametrize(("tolerance", "last"), [(1e-3, 3), (1e-4, 4), (0.3, 2), (9.0, 1)])
def test_passes_are_printed_until_all_are_within_tolerance(tolerance: float, last: int) -> None:
    rows = [line.split() for line in print_passes.passes(GRID, tolerance=tolerance).splitlines()]
    assert rows[0] == ["pass", "a", "■"]
    assert [int(row[0]) for row in rows[1:]] == list(range(1, last + 1))
    for n, row in enumerate(rows[1:]):
        assert [float(value) for value in row[1:]] == pytest.approx(
            GRID.log_prob[1:, n].tolist(),
            abs=5e-4,  # three digits are printed
        )


def test_a_place_without_runs_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["print_passes", str(tmp_path / "nowhere")])
    assert print_passes.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "nowhere" in err
