"""Where a result came from: commit, versions, device, command."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from experiments.command import command_line

ROOT = Path(__file__).parent.parent
PACKAGES = ("stateful_gpt", "torch", "tiktoken", "hydra-core", "wandb", "pandas", "pyarrow")


def provenance(device: torch.device) -> dict[str, Any]:
    """What ``status.json`` says about the origin of a run."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain")
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version()} | _versions(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "command": command_line(),
    }


def _git(*arguments: str) -> str | None:
    """The output of git in this checkout; None outside one."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {_processor()} ({platform.machine()}), {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
