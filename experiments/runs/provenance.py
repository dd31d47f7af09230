"""Where a result came from: commit, uncommitted changes, versions, device."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "stateful_gpt",
    "torch",
    "numpy",
    "tiktoken",
    "safetensors",
    "hydra-core",
    "omegaconf",
    "wandb",
    "pandas",
    "pyarrow",
    "matplotlib",
)
LARGEST_PATCH = 2**20  # bytes
# a new file outside of these, or of another kind, may be somebody's data: its content stays out
SOURCE_FOLDERS = ("conf", "stateful_gpt", "experiments", "analysis", "scripts", "tests")
SOURCE_SUFFIXES = (".py", ".yaml", ".yml", ".toml")


@dataclass(frozen=True)
class Changes:
    """What the working tree holds beyond its commit, as a patch for ``git apply``."""

    patch: bytes  # cut after the last file that fits into LARGEST_PATCH
    sha256: str  # of the whole patch
    size: int  # bytes of the whole patch
    left_out: int  # new files that may be data: not even named

    def record(self) -> dict[str, Any]:
        return {
            "sha256": self.sha256,
            "bytes": self.size,
            "kept_bytes": len(self.patch),
            "new_files_left_out": self.left_out,
        }


def provenance(device: "torch.device") -> dict[str, Any]:
    """What ``status.json`` says about the origin of a run."""
    import torch  # takes seconds: only where something was computed

    found = changes()
    return {
        "commit": _commit(),
        "dirty": None if _commit() is None else found is not None,
        "changes": None if found is None else found.record(),
        "versions": {"python": platform.python_version()} | _versions(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
    }


@lru_cache(maxsize=1)  # what a process runs is what it found when it began
def changes() -> Changes | None:
    """The changes in the checkout that runs; None if there are none, or no checkout."""
    if _commit() is None or not _git("status", "--porcelain"):
        return None
    new = (_git("ls-files", "--others", "--exclude-standard", "-z") or b"").split(b"\0")
    names = [os.fsdecode(name) for name in new if name]
    source = [name for name in names if _is_source(name)]
    patch = _patch(source)
    return Changes(
        patch=_cut(patch),
        sha256=hashlib.sha256(patch).hexdigest(),
        size=len(patch),
        left_out=len(names) - len(source),
    )


@lru_cache(maxsize=1)
def _commit() -> str | None:
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(os.fsdecode(top.strip())).resolve() != ROOT.resolve():
        return None  # an installed copy, perhaps inside somebody else's repository
    commit = _git("rev-parse", "HEAD")
    return None if commit is None else commit.decode().strip()


def _is_source(name: str) -> bool:
    path = Path(name)
    return path.parts[0] in SOURCE_FOLDERS and path.suffix in SOURCE_SUFFIXES


def _patch(new: list[str]) -> bytes:
    """Against the commit, with these new files; git's own index is left alone."""
    options = ("--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")
    index = _git("rev-parse", "--git-path", "index")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "index"
        try:
            # with its time: git tells by it which entries may be newer than they look
            shutil.copy2(ROOT / os.fsdecode((index or b"").strip()), copy)
        except OSError:
            new = []
        environment = {"GIT_INDEX_FILE": str(copy)} if new else {}
        if new:
            _git("add", "--intent-to-add", "--", *new, environment=environment)
        return _git("diff", *options, "HEAD", environment=environment) or b""


def _cut(patch: bytes) -> bytes:
    """The files of a patch from its beginning that fit into LARGEST_PATCH together."""
    if len(patch) <= LARGEST_PATCH:
        return patch
    return patch[: patch.rfind(b"\ndiff --git ", 0, LARGEST_PATCH) + 1]


def _git(*arguments: str, environment: dict[str, str] | None = None) -> bytes | None:
    """The output of git in this checkout; None outside one."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    inherited["GIT_OPTIONAL_LOCKS"] = "0"  # looking changes nothing, not even git's index
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=ROOT,
            env=inherited | (environment or {}),
            capture_output=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device_name(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {_processor()} ({platform.machine()}), {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
