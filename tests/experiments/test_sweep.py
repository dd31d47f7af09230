"""A sweep in one process: every cell is composed once, and is the job it would be alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from tests.experiments.conftest import Converge


def test_each_job_has_its_own_settings_and_is_composed_once(
    converge: Converge,
    runs: Callable[[], list[Path]],
    status: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    composed: list[str] = []
    compose = ConfigLoaderImpl.load_sweep_config

    def counted(self: Any, master: Any, overrides: list[str]) -> Any:
        composed.append(next(word for word in overrides if word.startswith("feedback.strength")))
        return compose(self, master, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    code, _, err = converge("feedback.strength=0.1,0.2,0.3", "-m")
    assert (code, err) == (0, "")
    assert composed == [f"feedback.strength=0.{number}" for number in (1, 2, 3)]
    found = {}
    for folder in runs():
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        found[config["feedback"]["strength"]] = status(folder)["command_of_this_run"]
    assert sorted(found) == [0.1, 0.2, 0.3]
    for strength, command in found.items():
        assert f"feedback.strength={strength} " in f"{command} "


def test_the_same_cell_twice_is_computed_once(
    converge: Converge, runs: Callable[[], list[Path]]
) -> None:
    code, out, err = converge("feedback.strength=0.1,0.1", "seed=1,2", "-m")
    assert (code, err) == (0, "")
    assert len(runs()) == 2
    assert out.startswith("2 runs\nrun 1 of 2: ")
