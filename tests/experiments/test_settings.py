"""Settings from conf/: the runs they stand for, frozen, and known without torch."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from pydantic import ValidationError

from analysis.runs import FORMERLY, SHORT_NAMES
from experiments.command import help_of
from experiments.converge.identity import run_id
from experiments.converge.settings import (
    SHIPPED,
    ConvergeSettings,
    DeviceSettings,
    FeedbackSettings,
    ModelSettings,
)
from experiments.runs.folder import RunFolder
from experiments.settings import ConfigError, parse, to_settings
from experiments.state_tracking import run as state_tracking
from experiments.state_tracking.settings import StateTrackingSettings, TaskSettings
from experiments.state_tracking.tasks import TASKS
from stateful_gpt.checkpoint import BUNDLED, Library
from stateful_gpt.device import DEVICES, DTYPES
from stateful_gpt.feedback import KINDS

ROOT = Path(__file__).parents[2]
CARRIED = "experiment=generation recompute.start=carried"
SAMPLED = "feedback=prob feedback.layers=[0,1] generation=sample generation.top_k=5 seed=3"
HIDDEN = "model=bundled_stateful feedback=hidden_state feedback.shift=0"
BOTH = "feedback.hidden_strength=0.5 recompute.tolerance=1e-4 recompute.damping=0.5"

EVERY = "recompute.tolerance=0"  # pass, as was the default

# what commit ca8ee83 calls the runs of these settings, with a model "m" and prompts "p"
IDS_OF_CA8EE83 = {
    EVERY: "97b1dbf562",
    f"{EVERY} feedback.strength=1e-1 recompute.iterations=32": "2db74c4d55",
    f"{EVERY} experiment=strength_sweep feedback.strength=-0.0": "27c2d797eb",
    f"{EVERY} {CARRIED}": "82b1e97499",
    f"{EVERY} {HIDDEN}": "374b431f68",
    f"{EVERY} {SAMPLED} generation.max_new_tokens=0": "b6eb46a9c3",  # draws nothing
    "recompute=windowed recompute.window=4 device.dtype=float64": "6a92e0d7a9",
    f"{BOTH} prompts.max_tokens=7": "65cfe1cc1c",
}
SAMPLED_OF_CA8EE83 = "28322d9322"
CONTESTANT = "contestant.passes=8 contestant.through=true"
RATES = "training.learning_rate=0.004 training.matrix_learning_rate=0.02"
CONTEST_IDS_OF_CA8EE83 = {
    "": "833795bb72",
    f"seed=2 {CONTESTANT} task.target=half": "9ea44f44b9",
    RATES: "7b3b1ba5a3",
}


@pytest.fixture(autouse=True)
def composer() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def settings_of(words: str) -> ConvergeSettings:
    return to_settings(compose("converge", overrides=words.split()), ConvergeSettings)


@pytest.mark.parametrize(("words", "identity"), IDS_OF_CA8EE83.items())
def test_runs_keep_the_names_that_they_had_before_there_were_more_settings(
    words: str, identity: str
) -> None:
    settings = settings_of(words)
    assert run_id(settings, model="m", prompts="p") == identity
    stored = json.loads(json.dumps(settings.plain()))  # and from their own config.yaml
    for section, key in (("device", "batch"), ("generation", "slide"), ("prompts", "split")):
        del stored[section][key]
    del stored["measures"]
    assert run_id(parse(stored, ConvergeSettings), model="m", prompts="p") == identity


def test_a_run_with_other_random_numbers_than_before_has_another_name() -> None:
    assert run_id(settings_of(f"{EVERY} {SAMPLED}"), model="m", prompts="p") != SAMPLED_OF_CA8EE83


@pytest.mark.parametrize(("words", "identity"), CONTEST_IDS_OF_CA8EE83.items())
def test_contests_keep_their_names(words: str, identity: str) -> None:
    config = compose("state_tracking", overrides=words.split())
    assert state_tracking.locate(to_settings(config, StateTrackingSettings)).id == identity


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("device.batch=3", True),
        ("prompts.split=text", True),
        ("generation.slide=2", False),
        ("measures.oracle=false", False),
        ("recompute.tolerance=0", False),
        ("recompute.tolerance=auto", True),
    ],
)
def test_a_new_setting_counts_where_it_changes_results(words: str, same: bool) -> None:
    one, other = (run_id(settings_of(w), model="m", prompts="p") for w in ("", words))
    assert (one == other) == same


def test_a_setting_that_has_a_former_value_has_it_in_tables_too() -> None:
    settings = ConvergeSettings()
    whole, deciding = settings.plain(), settings.deciding()
    for group in ("feedback", "recompute", "generation"):
        for key in set(whole[group]) - set(deciding[group]):
            value = whole[group][key]  # null is no other than one that is missing
            name = SHORT_NAMES.get(f"{group}.{key}", f"{group}.{key}")
            assert value is None or FORMERLY[name] == value, name


def test_a_run_stores_its_settings_as_before(tmp_path: Path) -> None:
    settings = settings_of(f"{SAMPLED} runs_dir={tmp_path}")
    RunFolder(tmp_path, settings.plain()).begin({})
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    stored: Any = yaml.safe_load(text)
    assert stored["feedback"] == {
        **{"kind": "prob", "strength": 0.5, "layers": [0, 1], "shift": 1},
        **{"hidden_strength": 0.0},
    }
    assert stored["recompute"] == {
        **{"solver": "full", "window": None, "iterations": 64, "tolerance": "auto"},
        **{"damping": 1.0, "start": "cold"},
    }
    assert "  layers:\n  - 0\n  - 1\n" in text
    assert parse(stored, ConvergeSettings) == settings


def test_the_source_of_prompts_is_the_file_where_there_is_one() -> None:
    assert settings_of("prompts.file=my.jsonl").prompts.source == "file"
    assert settings_of("").prompts.source == "builtin"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "bundled"),
        ("model=bundled_stateful", "bundled_stateful"),
        ("model.path=bundled_stateful", "bundled_stateful"),
        ("model=bundled_stateful model.path=runs/models/mine", "checkpoint"),
        ("model.path=out/ckpt.pt", "checkpoint"),
        ("model.path=out/ckpt.pt model.name=mine", "mine"),
        ("model=gpt2 model.path=folder", "gpt2"),
    ],
)
def test_no_other_model_is_called_by_the_name_of_a_shipped_one(words: str, name: str) -> None:
    assert settings_of(words).model.name == name


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        settings_of("").seed = 1


def test_a_value_from_a_shell_is_read_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA", "0.25")
    settings = settings_of("feedback.strength=${oc.env:BETA} study=2024")
    assert (settings.feedback.strength, settings.study) == (0.25, "2024")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model=checkpoint", "model.path must be given"),
        ("~feedback", "feedback must be given"),
        ("~feedback.strength", "feedback.strength must be given"),
        ("~study", "study must be given"),
        ("measures=5", "measures must be a group of settings (oracle, lyapunov, kl), got 5"),
        ("measures=null", "measures must be a group of settings (oracle, lyapunov, kl), got null"),
        ("~measures +measures=[1]", "measures must be a group of settings"),
        ("feedback.strength=${feedback.strength}", "feedback.strength"),
        ("seed=${seed}", "seed"),
        ("feedback.strength=${feedback}", "feedback.strength"),
        (f"seed={'9' * 4000}", "seed must be"),
        (
            f"runs_dir={'a' * 300}",
            "runs_dir must be a folder, not empty, of at most 2,000 characters",
        ),
        (f"runs_dir={'a/' * 2500}", "runs_dir must be a folder"),
        (f"feedback.kind={'x' * 5000}", "(5,002 characters)"),
    ],
)
def test_what_is_lacking_or_of_another_kind_is_one_sentence(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(words)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "Settings" not in str(caught.value)
    assert "\n" not in str(caught.value)


def choices(schema: Any, name: str) -> tuple[Any, ...]:
    return get_args(schema.model_fields[name].annotation)


def test_names_are_those_of_the_library() -> None:
    assert choices(DeviceSettings, "name") == tuple(DEVICES)
    assert choices(DeviceSettings, "dtype") == tuple(DTYPES)
    assert set(choices(FeedbackSettings, "kind")) == set(KINDS)
    assert SHIPPED == BUNDLED
    assert choices(TaskSettings, "name") == tuple(TASKS)
    assert choices(ModelSettings, "library") == get_args(Library)


def test_settings_and_help_need_no_torch() -> None:
    modules = [f"experiments.{name}.settings" for name in ("converge", "train", "state_tracking")]
    code = (
        f"import sys, experiments.command, {', '.join(modules)}; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("command", ["converge", "train", "state_tracking"])
def test_help_shows_every_setting_with_its_comment(command: str) -> None:
    out = help_of(command)
    for key in compose(command):
        assert f"\n{key}:" in out
    assert "  mode: offline # offline needs no account" in out
    text = (ROOT / "conf" / f"{command}.yaml").read_text(encoding="utf-8")
    for line in text.partition("\nhydra:")[0].splitlines():
        assert line in out
