"""The printed passes are the recorded ones, down to the first from which nothing moves."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from scripts import print_passes

TOKENS = ("<|endoftext|>", "a", "<|endoftext|>")
PASSES = ((None, -1.5, -0.25), (None, -2.0, -0.75), (None, -2.0, -0.5), (None, -2.0, -0.5004))
TRAJECTORY = pd.DataFrame(
    [
        {"step": 0, "iteration": n, "position": at, "token": TOKENS[at], "log_prob": value}
        for n, said in enumerate(PASSES, start=1)
        for at, value in enumerate(said)
    ]
)


@pytest.mark.parametrize(("tolerance", "last"), [(1e-3, 3), (1e-4, 4), (0.3, 2), (9.0, 1)])
def test_passes_are_printed_until_all_are_within_tolerance(tolerance: float, last: int) -> None:
    rows = [
        line.split() for line in print_passes.passes(TRAJECTORY, tolerance=tolerance).splitlines()
    ]
    assert rows[0] == ["pass", "a", "■"]
    assert [int(row[0]) for row in rows[1:]] == list(range(1, last + 1))
    for n, row in enumerate(rows[1:]):
        assert [float(value) for value in row[1:]] == pytest.approx(
            list(PASSES[n][1:]),
            abs=5e-4,  # three digits are printed
        )


CONTEST = str(Path(__file__).parents[1] / "fixtures" / "ca8ee83" / "old_contest")


@pytest.mark.parametrize(("source", "said"), [("nowhere", "nowhere"), (CONTEST, "no trajectory")])
def test_a_place_without_trajectories_is_one_sentence(
    source: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["print_passes", source])
    assert print_passes.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err
