"""A sweep in one process: every cell is composed once, and is the job it would be alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from experiments.converge.settings import ConvergeSettings
from experiments.runs.compute_once import Asked
from experiments.sweeps import study
from experiments.sweeps.sweep import CellJob, Runner
from tests.experiments.conftest import Converge


def test_each_job_has_its_own_settings_though_cells_share_their_composing(
    converge: Converge,
    runs: Callable[[], list[Path]],
    status: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    composed: list[list[str]] = []
    compose = ConfigLoaderImpl.load_sweep_config

    def counted(self: Any, master: Any, overrides: list[str]) -> Any:
        composed.append(overrides)
        return compose(self, master, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    words = ("feedback=log_prob,logit", "feedback.strength=0.1,0.2", "feedback.layers=[0],all")
    code, _, err = converge(*words, "-m")
    assert (code, err) == (0, "")
    assert len(composed) == 2  # once for every choice of a group
    found = {}
    for folder in runs():
        feedback = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["feedback"]
        cell = (feedback["kind"], feedback["strength"], str(feedback["layers"]))
        found[cell] = status(folder)["command_of_this_run"]
    assert len(found) == 8
    for (kind, strength, layers), command in found.items():
        assert f"feedback={kind} feedback.strength={strength} " in f"{command} "
        assert f"feedback.layers={layers}" in command
        # alone, it is the same run
        words = (f"feedback={kind}", f"feedback.strength={strength}", f"feedback.layers={layers}")
        assert "nothing to compute" in converge(*words)[1]


def test_a_machine_that_does_not_see_the_folder_of_a_sweep_says_so(
    tmp_path: Path, status: Callable[[Path], dict[str, Any]]
) -> None:
    settings = ConvergeSettings(runs_dir=str(tmp_path), study="s")
    runner = Runner(
        name="converge",
        settings=ConvergeSettings,
        compute="experiments.converge.run:converge",
        locate="experiments.converge.identity:locate",
    )
    elsewhere = str(tmp_path / "elsewhere")
    CellJob(runner, Asked(), elsewhere, None, 0, 1, [], "").compute(settings, [], 0)
    (folder,) = (tmp_path / "s").iterdir()
    said = status(folder)["error"]
    assert said.startswith(f"the folder {elsewhere!r}, from which the sweep was started, is not on")
    assert not (folder / "traceback.txt").exists()


def test_the_same_cell_twice_is_computed_once(
    converge: Converge, runs: Callable[[], list[Path]]
) -> None:
    code, out, err = converge("feedback.strength=0.1,0.1", "seed=1,2", "-m")
    assert (code, err) == (0, "")
    assert len(runs()) == 2
    assert out.startswith("2 runs\nrun 1 of 2: ")


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_the_word_for_a_sweep_may_stand_between_settings(converge: Converge, flag: str) -> None:
    code, out, err = converge("study=a", flag, "feedback.strength=0,1", "--dry-run")
    assert (code, err) == (0, "")
    assert out.endswith("2 runs: 2 missing\n")


def test_the_same_cell_in_two_studies_is_computed_in_both(
    converge: Converge, tmp_path: Path
) -> None:
    code, out, err = converge("study=a,b", "-m")
    assert (code, err) == (0, "")
    assert out.startswith("2 runs\nrun 1 of 2: ")
    assert len(list(tmp_path.glob("runs/[ab]/*/summary.json"))) == 2


def test_a_finished_run_is_looked_through_once_a_sweep(
    converge: Converge, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert converge("feedback.strength=0,1", "-m")[0] == 0
    looked: list[Path] = []
    damage = study.damage

    def counted(folder: Path) -> str | None:
        looked.append(folder)
        return damage(folder)

    monkeypatch.setattr(study, "damage", counted)
    code, out, _ = converge("feedback.strength=0,1,2", "-m")
    assert code == 0
    assert "3 runs: 3 finished" in out
    assert len(looked) == len(set(looked)) == 2, "the third has just been written"


def test_a_larger_sweep_asks_hydra_no_more_of_its_groups(
    converge: Converge, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    options = ConfigLoaderImpl.get_group_options

    def counted(self: Any, group: str, *words: Any) -> list[str]:
        asked.append(group)
        return options(self, group, *words)

    monkeypatch.setattr(ConfigLoaderImpl, "get_group_options", counted)
    counts = []
    for values in ("0,1", "range(0,20)"):
        asked.clear()
        assert converge(f"feedback.strength={values}", "-m", "--dry-run")[0] == 0
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0, "each time takes longer than all else of a cell"
