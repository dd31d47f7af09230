"""Every settings file composes, and shows a command that works."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments.converge.settings import ConvergeSettings
from experiments.settings import to_settings
from experiments.state_tracking.settings import StateTrackingSettings
from experiments.sweeps.launchers import prefer_our_settings
from experiments.train.settings import TrainSettings

CONF = Path(__file__).parents[2] / "conf"
PRIMARY = {
    "converge": ConvergeSettings,
    "train": TrainSettings,
    "state_tracking": StateTrackingSettings,
}
FILES = sorted(
    str(path.relative_to(CONF))
    for path in CONF.rglob("*.yaml")
    if path.name != "wandb_sweep.yaml"  # W&B reads it, not Hydra
)
GROUPS = [name for name in FILES if "/" in name and not name.startswith("hydra/")]
LAUNCHERS = [name for name in FILES if name.startswith("hydra/launcher/")]


@pytest.fixture(scope="module", autouse=True)
def composer() -> Iterator[None]:
    GlobalHydra.instance().clear()
    prefer_our_settings()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def settings_of(
    runner: str, words: list[str]
) -> ConvergeSettings | TrainSettings | StateTrackingSettings:
    config = compose(runner, overrides=words)
    if "model" in config and OmegaConf.is_missing(config.model, "path"):
        config.model.path = "out/ckpt.pt"  # a group that asks for a path
    if "prompts" in config and config.prompts.source == "file" and config.prompts.file is None:
        config.prompts.file = "my.jsonl"  # likewise
    assert isinstance(config, DictConfig)
    return to_settings(config, PRIMARY[runner])


def command_in(name: str) -> list[str]:
    """The words of the command that a settings file shows in its first lines."""
    for line in (CONF / name).read_text(encoding="utf-8").splitlines()[:2]:
        if line.startswith("# python -m experiments."):
            return shlex.split(line.removeprefix("# ").split("   ")[0])  # a remark may follow
    raise AssertionError(f"conf/{name} shows no command in its first two lines")


def swept(words: list[str]) -> list[list[str]]:
    """The overrides of every job of a command line; a sweep is all combinations."""
    jobs: list[list[str]] = [[]]
    for override in OverridesParser.create().parse_overrides(words):
        if override.is_sweep_override():
            choices = [f"{override.key_or_group}={v}" for v in override.sweep_string_iterator()]
        else:
            choices = [str(override.input_line)]
        jobs = [[*job, choice] for job in jobs for choice in choices]
    return jobs


def every_value(jobs: list[list[str]]) -> list[list[str]]:
    """So few jobs of a sweep of hundreds that each value of each setting is in one of them."""
    chosen: list[list[str]] = []
    missing = {word for job in jobs for word in job}
    while True:
        richest = max(jobs, key=lambda job: len(missing.intersection(job)))
        chosen.append(richest)
        missing -= set(richest)
        if not missing:
            return chosen


def overlay_sweep(name: str) -> list[str]:
    """What the sweeper is told by an overlay."""
    content = OmegaConf.to_container(OmegaConf.load(CONF / name))
    assert isinstance(content, dict)
    params = content.get("hydra", {}).get("sweeper", {}).get("params", {})
    return [f"{key}={value}" for key, value in params.items()]


@pytest.mark.parametrize("name", FILES)
def test_every_file_shows_a_command_that_composes_and_uses_it(name: str) -> None:
    words = command_in(name)
    assert words[:2] == ["python", "-m"]
    runner = words[2].removeprefix("experiments.")
    overrides = [word for word in words[3:] if word != "-m"]
    for job in every_value(swept([*overrides, *overlay_sweep(name)])):
        settings_of(runner, job)
    if name in LAUNCHERS:
        assert f"hydra/launcher={Path(name).stem}" in overrides
    elif "/" in name:
        group, choice = Path(name).parent.name, Path(name).stem
        group = "override hydra/sweeper" if group == "sweeper" else group
        default = OmegaConf.load(CONF / f"{runner}.yaml").defaults
        uses = {key: value for entry in default if isinstance(entry, DictConfig)
                for key, value in entry.items()}  # fmt: skip
        uses |= dict(word.split("=", 1) for word in overrides if word.split("=")[0] in uses)
        assert uses[group] == choice, "the command shown uses the file it stands in"
    else:
        assert runner == Path(name).stem


@pytest.mark.parametrize("name", [n for n in GROUPS if not n.startswith("experiment/")])
def test_every_group_choice_names_every_field_of_its_group(name: str) -> None:
    group = Path(name).parent.name
    content = OmegaConf.load(CONF / name)
    fields = ConvergeSettings().plain()[group]
    assert set(content) == set(fields), "a reader sees all the settings there are"
    settings = settings_of("converge", [f"{group}={Path(name).stem}"])
    assert isinstance(settings, ConvergeSettings)


@pytest.mark.parametrize(
    "name", [*LAUNCHERS, *(n for n in GROUPS if not n.startswith("experiment/"))]
)
def test_every_setting_in_a_file_is_explained_beside_it(name: str) -> None:
    lines = (CONF / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if ":" in line and "#" not in line] == []


@pytest.mark.parametrize("name", [n for n in GROUPS if n.startswith("experiment/")])
def test_an_overlay_wins_over_the_groups_and_yields_to_the_command_line(name: str) -> None:
    choice = Path(name).stem
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF / name))
    runner = command_in(name)[2].removeprefix("experiments.")
    config: Any = OmegaConf.to_container(compose(runner, overrides=[f"experiment={choice}"]))
    for section, values in content.items():
        if section in ("hydra", "defaults"):
            continue
        if isinstance(values, dict):
            for key, value in values.items():
                assert config[section][key] == value
        else:
            assert config[section] == values
    again = compose(runner, overrides=[f"experiment={choice}", "seed=77"])
    assert again.seed == 77


def test_make_study_is_the_sweep_that_the_readme_speaks_of() -> None:
    jobs = swept(overlay_sweep("experiment/strength_sweep.yaml"))
    strengths = [float(job[0].split("=")[1]) for job in jobs]
    assert len(strengths) == 9
    assert (min(strengths), max(strengths)) == (-1, 2)
    assert 0 in strengths
    settings = settings_of("converge", ["experiment=strength_sweep"])
    assert isinstance(settings, ConvergeSettings)
    assert settings.prompts.limit == 4
    assert settings.prompts.max_tokens is not None
    assert settings.recompute.iterations >= settings.prompts.max_tokens - 1, "all can settle"
