"""Where a result came from: commit, uncommitted changes, versions, device."""

import hashlib
import os
import platform
import subprocess
import tempfile
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("stateful_gpt", "torch", "numpy", "tiktoken", "safetensors", "hydra-core", "omegaconf"),
    *("wandb", "pandas", "pyarrow", "matplotlib"),
)
LARGEST_PATCH = 2**20  # bytes
# a new file outside of these, or of another kind, may be somebody's data: its content stays out
SOURCE_FOLDERS = (
    *("stateful_gpt", "experiments", "analysis", "scripts", "hydra_plugins"),
    *("conf", "tests"),
)
SOURCE_SUFFIXES = (".py", ".yaml", ".yml", ".toml")


class Changes(NamedTuple):
    """What the working tree holds beyond its commit."""

    patch: bytes  # for ``git apply``, cut after the last file that fits into LARGEST_PATCH
    record: dict[str, Any]  # what ``status.json`` says of it


def provenance(device: "torch.device") -> dict[str, Any]:
    """What ``status.json`` says about the origin of a run."""
    import torch  # takes seconds: only where something was computed

    found, threads = changes(), torch.get_num_threads()
    name = f"cpu: {_processor()} ({platform.machine()}), {threads} threads"
    if device.type == "cuda":
        name = f"cuda: {torch.cuda.get_device_name(device)}"
    return {
        "commit": _commit(),
        "dirty": None if (status := _status()) is None else bool(status),
        "changes": None if found is None else found.record,
        "versions": {"python": platform.python_version()} | _versions(),
        "device": name,
        "threads": threads,
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


@lru_cache(maxsize=1)  # what a process runs is what it found when it began
def changes() -> Changes | None:
    """The changes in the checkout that runs; None if none are known of."""
    if not _status():
        return None
    with tempfile.TemporaryDirectory() as folder:
        index = f"{folder}/index"  # of our own: git's is left alone
        _git("read-tree", "HEAD", index=index)
        listed = _git("ls-files", "--others", "--exclude-standard", "-z", index=index) or b""
        new = [Path(os.fsdecode(name)) for name in listed.split(b"\0") if name]
        known = [path for path in new if path.parts[0] in SOURCE_FOLDERS]
        source = [str(path) for path in known if path.suffix in SOURCE_SUFFIXES]
        if source:
            _git("add", "--intent-to-add", "--", *source, index=index)
        options = ("--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")
        patch = _git("diff", *options, "HEAD", index=index) or b""
    kept = patch
    if len(patch) > LARGEST_PATCH:
        kept = patch[: patch.rfind(b"\ndiff --git ", 0, LARGEST_PATCH) + 1]
    record = {
        "sha256": hashlib.sha256(patch).hexdigest(),
        "bytes": len(patch),
        "kept_bytes": len(kept),
        "new_files_left_out": len(new) - len(source),  # they may be data
    }
    return Changes(kept, record)


@lru_cache(maxsize=1)
def _status() -> bytes | None:
    """What git says of the checkout; None outside one, or where git does not answer."""
    return None if _commit() is None else _git("status", "--porcelain")


@lru_cache(maxsize=1)
def _commit() -> str | None:
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(os.fsdecode(top.strip())).resolve() != ROOT.resolve():
        return None  # an installed copy, perhaps inside somebody else's repository
    commit = _git("rev-parse", "HEAD")
    return None if commit is None else commit.decode().strip()


def _git(*arguments: str, index: str | None = None) -> bytes | None:
    """The output of git in this checkout; None outside one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # looking changes nothing, not even git's index
    if index is not None:
        environment["GIT_INDEX_FILE"] = index
    how: Any = {"cwd": ROOT, "env": environment, "capture_output": True, "timeout": 10}
    try:
        return bytes(subprocess.run(["git", *arguments], check=True, **how).stdout)
    except (OSError, subprocess.SubprocessError):
        return None


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _processor() -> str:
    with suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
