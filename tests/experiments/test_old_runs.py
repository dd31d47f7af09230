"""Run folders as commit ca8ee83 has written them: reported, verified, resumed, loaded and drawn.

``tests/fixtures/ca8ee83`` was made once by that commit: of the bundled model on built-in prompts of
8 tokens with 3 passes, a run, a generation, one killed behind its second prompt of three, and a
contest of state tracking.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from analysis import load
from analysis.__main__ import main as analysis
from experiments import status as status_command
from experiments.converge.run import converge
from experiments.runs.folder import damage
from experiments.settings import parse
from experiments.state_tracking.run import track
from experiments.state_tracking.settings import StateTrackingSettings
from experiments.verify import find, settings_of, verify

OLD = Path(__file__).parents[1] / "fixtures" / "ca8ee83"
FIXED, GENERATED, KILLED, CONTEST = "32c8582498", "54a1ba9363", "ab981385f7", "fcbc7ae9c1"
TABLES = ("trajectory.parquet", "iterations.parquet")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy that may be written to, where nothing else is."""
    return Path(shutil.copytree(OLD, tmp_path / "runs"))


def test_status_reports_them(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["status", str(old / "old")])
    assert status_command.main() == 1
    out = capsys.readouterr().out
    assert "3 runs: 2 finished, 1 interrupted" in out
    assert "log_prob β=0.5 n=3 carried +2 tokens" in out
    monkeypatch.setattr(sys, "argv", ["status", str(old / "old_contest")])
    assert status_command.main() == 0
    assert "1 run: 1 finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", [FIXED, GENERATED])
def test_finished_ones_are_found_finished_and_reproduced(
    old: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place,) = find(old, [name])
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert converge(settings_of(place, old)) == place, "today's settings name the same run"
    assert "nothing to compute" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    reproduced, sentence, warning = verify(place)
    assert reproduced, sentence
    assert "ca8ee830ff2e" in warning


def test_a_contest_is_found_finished(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = old / "old_contest" / CONTEST
    stored = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
    settings = parse({**stored, "runs_dir": str(old)}, StateTrackingSettings)
    assert track(settings) == place, "today's settings name the same run"
    assert "nothing to compute" in capsys.readouterr().out


def test_kept_prompts_without_a_checksum_are_computed_again(old: Path) -> None:
    place = old / "old" / KILLED
    assert len(list((place / ".prompts").glob("*.json"))) == 2
    assert converge(settings_of(place, old)) == place
    said = json.loads((place / "status.json").read_text())
    assert (said["state"], said["kept"]) == ("finished", [])
    summary = json.loads((place / "summary.json").read_text())
    names = [prompt["prompt_id"] for prompt in summary["prompts"]]
    assert names == ["prose", "dialogue", "repetition"]


@pytest.mark.parametrize("name", [*TABLES, "accuracy.parquet"])
def test_damage_within_their_pages_is_noticed_by_all(
    old: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = old / ("old_contest" if name == "accuracy.parquet" else "old")
    place = run / (CONTEST if name == "accuracy.parquet" else FIXED)
    raw = bytearray((place / name).read_bytes())
    raw[4:60] = bytes(56)  # the footer stays as it was
    (place / name).write_bytes(raw)
    assert damage(place) == f"unreadable {name}"
    assert analysis(["table", str(place)]) == 2
    assert f"(unreadable {name})" in capsys.readouterr().err


def test_they_load_and_make_tables(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = load(str(old / "old"))
    assert set(study.runs["run_id"]) == {FIXED, GENERATED}
    estimates = study.trajectory
    assert estimates.loc[estimates["position"] == 0, "log_prob"].isna().all(), "as it is now"
    assert [one.run_id for one in study.left_out] == [KILLED]
    csv = tmp_path / "table.csv"
    assert analysis(["table", str(old / "old"), "--csv", str(csv)]) == 0
    assert all(name in csv.read_text() for name in (FIXED, GENERATED))
    assert KILLED in "".join(capsys.readouterr())
    assert analysis(["table", str(old / "old_contest"), "--csv", str(csv)]) == 0
    assert CONTEST in csv.read_text()


def test_they_are_drawn(old: Path, tmp_path: Path) -> None:
    assert analysis(["figures", str(old / "old"), "--out", str(tmp_path / "drawn")]) == 0
    assert list((tmp_path / "drawn").glob("*.png"))
    assert analysis(["figures", str(old / "old_contest"), "--out", str(tmp_path / "contest")]) == 0
    assert list((tmp_path / "contest").glob("*.png"))
