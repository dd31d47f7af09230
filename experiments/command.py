"""How a command of this project is started: Hydra around it, one sentence for what goes wrong.

Exit codes: 0 all done, 1 a run failed, 2 the settings are wrong, 130 interrupted.
"""

import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.runs.compute_once import Asked, RunError, disk_sentence, short
from experiments.settings import ConfigError, sentence, to_settings
from experiments.sweeps import launchers, sweep
from experiments.sweeps.report import report
from experiments.sweeps.study import RUNNERS, survey
from experiments.sweeps.sweep import Launch, Overrides, Runner
from stateful_gpt import console
from stateful_gpt.console import cut, exhausted

CONF = Path(__file__).resolve().parent.parent / "conf"
DRY_RUN = "--dry-run"


class Command:
    """What Hydra calls: with one configuration, or through its sweeper with all of a sweep."""

    def __init__(self, runner: Runner, typed: str, *, dry_run: bool) -> None:
        self.runner, self.typed, self.dry_run = runner, typed, dry_run
        self.began, self.code = False, 0

    def __call__(self, config: DictConfig) -> None:
        """One run, and how its study stands then."""
        self.began = True
        asked = Asked(self.typed, self.runner.command_of_run(sweep.overrides_of_the_job()))
        settings: Any = None
        try:
            if self.dry_run:
                self.code = sweep.rehearse(self.runner, [config])
                return
            settings = to_settings(config, self.runner.settings)
            self.runner.run(settings, asked)
        except (ConfigError, RunError, KeyboardInterrupt) as error:  # Hydra would say more
            self.code = _say_why(error)
            if HydraConfig.get().mode is RunMode.MULTIRUN:  # of another sweeper than ours
                print(f"that was {asked.command_of_this_run}", file=sys.stderr)
                raise
            if isinstance(error, ConfigError):
                return
        except Exception as error:
            if exhausted(error) or HydraConfig.get().mode is not RunMode.MULTIRUN:
                raise
            traceback.print_exc()  # Hydra would show that of the first mistake alone
            print(f"that was {asked.command_of_this_run}", file=sys.stderr)
            raise RunError(short(error)) from None
        if self.runner.locate is not None and settings is not None:  # None: interrupted before
            found = survey(Path(settings.runs_dir) / settings.study)
            if found.runs:  # none where no folder could be made
                print(f"\n{report(found)}")

    def sweep(
        self, config: DictConfig, jobs: Sequence[tuple[Overrides, DictConfig]], launch: Launch
    ) -> None:
        """For the sweeper in ``hydra_plugins``."""
        self.began = True
        if self.dry_run:
            self.code = sweep.rehearse(self.runner, [job for _, job in jobs])
        else:
            self.code = sweep.sweep(self.runner, self.typed, config, jobs, launch)


def run_command(runner: Runner) -> int:
    """Run a command with the words that it was given; its exit code."""
    # β on any terminal, also from the workers of a launcher
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    os.environ["PYTHONIOENCODING"] = f"{encoding}:backslashreplace"
    # like Ctrl-C it ends all workers on this machine, too; Slurm's jobs are to outlive us
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return console.run_command(runner.name, lambda: _run(runner))


def _run(runner: Runner) -> int:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_of(runner.name, sys.argv[1:]))
        return 0
    sys.argv = [word for word in sys.argv if word != "experiment=null"]  # as without it
    # Hydra would take no override behind it where others stand before it
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    if dry_run := DRY_RUN in sys.argv[1:]:
        if runner.locate is None:
            return _say(f"{DRY_RUN} lists runs of studies, which {' and '.join(RUNNERS)} have", 2)
        sys.argv.remove(DRY_RUN)
    for word in sys.argv[1:]:
        if (problem := _impossible(word, runner.name)) is not None:
            return _say(problem, 2)
    launchers.prefer_our_settings()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on instead of printing them
    command = Command(runner, runner.command_of_run(sys.argv[1:]), dry_run=dry_run)
    try:
        hydra.main(config_path=str(CONF), config_name=runner.name, version_base="1.3")(command)()
    except (ConfigError, RunError, KeyboardInterrupt) as error:
        return command.code or _say_why(error)  # a worker of a launcher may not be heard
    except (HydraException, OmegaConfBaseException) as error:
        place = getattr(error, "missing_cfg_file", None) or ""
        options = overlays(runner.name) if "experiment/" in place else None
        return _say(sentence(error, options=options), 2)
    except (ValueError, YAMLError) as error:  # Hydra's, on ``=1``, or on a file of settings
        if command.began:
            raise
        return _say(f"an override or a file of settings cannot be read: {cut(error, 500)}", 2)
    except OSError as error:
        key = "runs_dir" if command.began else None  # before, Hydra makes its hydra.run.dir
        return _say(disk_sentence(error, error.filename, key=key), 1)
    return command.code


def _impossible(word: str, command: str) -> str | None:
    """What is wrong with an override on which Hydra would end in a traceback, or not say why."""
    key, equals, value = word.partition("=")
    group = key.lstrip("+")
    if re.search(rf"[\d_]{{{sys.get_int_max_str_digits() + 1}}}", value):
        return f"{cut(key)} must be a number of fewer digits, got {cut(value)}"
    if re.match(r"--[\w.]*\.", word):
        return f"{cut(key)} must be written KEY=VALUE, without dashes"
    if re.search(r"[\ud800-\udfff]", word):  # what is no UTF-8 arrives so; no file could say it
        return f"{cut(key)} must be UTF-8, got {cut(value)}"
    if (equals or word.startswith("~")) and len(key.encode()) > 255:  # it may name a folder of conf
        return f"the key {cut(key)} must have at most 255 bytes"
    inner = r"(\.launcher(\.ray(\.init|\.remote)?)?|\.sweeper(\.params(?!=null$))?)?"
    if re.match(rf"\+*hydra{inner}=(?!\{{)", word):
        return f"{group} must be a group of settings, such as {{key: value}}, got {cut(value)}"
    if group == "experiment":
        for overlay in value.split(","):
            if (other := _commands().get(overlay.strip(" '\""), command)) != command:
                return (
                    f"experiment={overlay} is for python -m experiments.{other}; python -m"
                    f" experiments.{command} has {', '.join(overlays(command))}"
                )
    is_group = group != "" and (CONF / group).is_dir()
    if is_group and re.match(r"\[|[-+.\d]|null$", value):
        hydras = ["basic"] if group.startswith("hydra/") else []
        choices = sorted([*hydras, *(path.stem for path in (CONF / group).glob("*.yaml"))])
        return f"{group} must be one of {', '.join(choices)}, got {cut(value)}"
    if is_group and key.startswith("+"):  # every group has a choice already
        return f"{cut(key)} must be written without +: {group}={cut(value)}"
    return None


def _say_why(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted; the same command carries on", 130)
    return _say(str(error), 2 if isinstance(error, ConfigError) else 1)


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def help_of(command: str, words: Sequence[str] = ()) -> str:
    """What ``--help`` prints: the files of ``conf/`` with all settings and their comments, of each
    group the one that the words choose, or its default.
    """
    chosen = dict(word.split("=", 1) for word in words if "=" in word)
    own = (CONF / f"{command}.yaml").read_text("utf-8").partition("\nhydra:")[0]
    parts = [f"python -m experiments.{command} [KEY=VALUE ...] [-m]\n\n{own}"]
    for group, default in re.findall(r"^  - (\w+): (\w+)", own, re.MULTILINE):
        choice = chosen.get(group, default)
        path = CONF / group / f"{choice}.yaml"
        if group != "experiment" and os.path.isfile(path):  # at peace with too long a name
            others = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
            text = path.read_text("utf-8").rstrip().replace("\n", "\n  ")
            parts.append(f"{group}: # {group}={choice} of {others}\n  {text}\n")
    parts.append(f"experiment= is one of {', '.join(overlays(command))}")
    if command != "train":
        parts.append("--dry-run says which runs these are and how they stand; it computes nothing.")
    parts.append("--cfg job prints the settings as they come out, --hydra-help Hydra's options.")
    return "\n".join(parts)


def overlays(command: str) -> list[str]:
    """The choices of ``experiment=`` that are for a command."""
    return [overlay for overlay, name in _commands().items() if name == command]


def _commands() -> dict[str, str]:
    """The command that each overlay is for, as its first lines show it."""
    pattern, commands = re.compile(r"^# python -m experiments\.(\w+)", re.MULTILINE), {}
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        if found := pattern.search(path.read_text("utf-8")):
            commands[path.stem] = found[1]
    return commands
