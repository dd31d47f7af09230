"""What a command offers, read from ``conf/``: ``--help`` with its comments, overlays by command."""

import re
import sys
from pathlib import Path

from experiments.settings import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"

_CLOSING = """\
-m sweeps: python -m experiments.{command} -m KEY=VALUE,VALUE ...
--cfg job prints the settings as they come out; --hydra-help shows Hydra's own options."""


def answered(command: str) -> bool:
    """Print what ``--help`` asks for; False if it is not asked for."""
    words = sys.argv[1:]
    if not {"--help", "-h"} & set(words):
        return False
    chosen = dict(word.split("=", 1) for word in words if "=" in word)
    print(f"python -m experiments.{command} [KEY=VALUE ...] [-m]\n")
    blocks = _blocks(CONF / f"{command}.yaml")
    own = [text for name, text in blocks.items() if name not in ("", "defaults", "hydra")]
    for group, default in re.findall(r"- (\w+): (\w+)", blocks["defaults"]):
        choice = chosen.get(group, default)
        if group == "experiment" or not (CONF / group / f"{choice}.yaml").exists():
            continue
        others = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        lines = (CONF / group / f"{choice}.yaml").read_text(encoding="utf-8").splitlines()
        print(f"{group}: # {group}={choice} of {', '.join(others)}")
        print("".join(f"  {line}\n" for line in lines if not line.startswith("#")))
    print("\n".join(text.rstrip() for text in own))
    print(f"\nexperiment: null # or one of {', '.join(overlays(command))}\n")
    print(_CLOSING.format(command=command))
    return True


def overlays(command: str) -> list[str]:
    """The choices of ``experiment=`` that are for a command."""
    names = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
    return [name for name in names if command_of(name) == command]


def command_of(overlay: str) -> str | None:
    """The command that an overlay is for, as its first lines show it; None of an unknown one."""
    path = CONF / "experiment" / f"{overlay}.yaml"
    if not path.exists():
        return None
    found = re.search(r"^# python -m experiments\.(\w+)", path.read_text("utf-8"), re.MULTILINE)
    return found[1] if found else None


def refuse_overlay(command: str, overlay: str | None) -> None:
    """Raises ConfigError if an overlay is for another command."""
    other = command_of(overlay) if overlay else None
    if other not in (None, command):
        raise ConfigError(
            f"experiment={overlay} is for python -m experiments.{other}; python -m experiments."
            f"{command} has {', '.join(overlays(command))}"
        )


def _blocks(path: Path) -> dict[str, str]:
    """The text of each top-level key of a settings file, comments and all."""
    parts = re.split(r"^(?=\w+:)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {part.partition(":")[0] if part[:1].isalpha() else "": part for part in parts}
