"""Hydra's launchers: which extra each needs, how cores and GPUs are divided among their workers."""

import fcntl
import itertools
import os
import sys
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import open_dict, read_write

from experiments.settings import ConfigError
from stateful_gpt.console import cut

BASIC = "basic"
SUBMITIT_LOCAL = "submitit_local"
SUBMITIT = (SUBMITIT_LOCAL, "submitit_slurm")
VISIBLE = "CUDA_VISIBLE_DEVICES"
TAKEN = "STATEFUL_GPT_WORKER_OF"  # the folder of the sweep in which this process has taken a GPU
# hydra/launcher=: the extra that installs it
EXTRAS = {"joblib": "joblib", **dict.fromkeys(SUBMITIT, "submitit"), "ray": "ray"}


def prefer_our_settings() -> None:
    """Have ``conf/hydra/launcher/`` stand for itself: Hydra would match each file with the plugin's
    entry of the same name and warn, in every job, that it once will not.
    """
    Plugins.instance()  # which adds the entries
    entries = ConfigStore.instance().repo["hydra"]["launcher"]
    for launcher in EXTRAS:
        entries.pop(f"{launcher}.yaml", None)


def check_installed(launcher: str) -> None:
    """Raise ConfigError if the launcher's extra is not installed."""
    extra = EXTRAS.get(launcher)
    if extra is not None and find_spec(f"hydra_plugins.hydra_{extra}_launcher") is None:
        raise ConfigError(
            f"hydra/launcher={launcher} needs the extra {extra!r}: pip install -e '.[{extra}]'"
            " -c constraints.txt"
        )


def workers(
    launcher: str, options: Any, sweeper: Any, *, runs: int, devices: Collection[str]
) -> int | None:
    """How many jobs run at a time on this machine; None where others decide.

    With the basic launcher, as ``hydra.sweeper.processes`` says: one where a GPU computes them, and
    where processes cannot be forked. Left alone, submitit_local would start all at the same moment.
    """
    batch, forks = sweeper.max_batch_size, sweeper.processes
    if batch is not None:
        _count("hydra.sweeper.max_batch_size", batch)
    forks = cores() if forks == "cores" else _count("hydra.sweeper.processes", forks, "cores or ")
    if launcher == BASIC:
        alone = forks == 1 or sys.platform != "linux" or _visible_gpus(devices)
        return 1 if alone else min(forks, runs)
    if launcher == "joblib":
        asked = options.n_jobs
        if isinstance(asked, int) and asked < 0:
            return max(1, cores() + 1 + asked)
        return _count("hydra.launcher.n_jobs", asked, "-1 for all cores, or ")
    if launcher == SUBMITIT_LOCAL:
        return batch or cores()
    return None


def threads(launcher: str, options: Any, *, workers: int | None) -> int | None:
    """PyTorch threads of each worker; None leaves PyTorch alone.

    Depends on the settings and the machine only, not on what is left to compute: a sweep that is
    carried on computes with as many threads, hence the same bits, as an undisturbed one.
    """
    if launcher == BASIC and workers == 1:
        return None
    if wanted := os.environ.get("OMP_NUM_THREADS", ""):
        return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else None
    if launcher == "ray":
        asked = (options.ray.get("remote") or {}).get("num_cpus")
        return max(1, int(asked)) if isinstance(asked, (int, float)) else 1
    if launcher == "submitit_slurm":
        asked = options.get("cpus_per_task")
        return None if asked is None else _count("hydra.launcher.cpus_per_task", asked)
    return None if workers is None else max(1, cores() // workers)


def gpus(launcher: str, options: Any, *, devices: Collection[str]) -> list[str]:
    """The GPUs that the workers on this machine divide, as ``CUDA_VISIBLE_DEVICES`` names them.

    Ray and Slurm divide them by themselves: where a run is to use one they are asked for it.
    """
    if launcher in ("ray", "submitit_slurm") and "cuda" in devices:
        with read_write(options), open_dict(options):
            if launcher == "ray":
                options.ray.remote.num_gpus = options.ray.remote.get("num_gpus") or 1
            else:
                options.gpus_per_node = options.get("gpus_per_node") or 1
    if launcher not in ("joblib", SUBMITIT_LOCAL) or options.get("gpus_per_node"):
        return []  # the second: the user has divided them
    return _visible_gpus(devices)


def _visible_gpus(devices: Collection[str]) -> list[str]:
    """As ``CUDA_VISIBLE_DEVICES`` names them; none where no device of a run may be one."""
    if set(devices) <= {"cpu"}:
        return []
    visible = os.environ.get(VISIBLE)
    if visible is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    return [name for name in visible.split(",") if name]


def take_gpu(gpus: Sequence[str], folder: str) -> None:
    """Have this process see one of the GPUs, until it ends: the one that fewest others see.

    ``folder`` is for the locks of the sweep's workers: one that ends in any way lets go of its own.
    """
    if os.environ.get(TAKEN) == folder:  # in an earlier run of this worker
        return
    for place in itertools.count():
        descriptor = os.open(Path(folder, str(place)), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:  # left open: the lock is held as long as this process lives
            os.environ[VISIBLE], os.environ[TAKEN] = gpus[place % len(gpus)], folder
            return


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count(key: str, value: Any, other: str = "") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} must be {other}a whole number above 0, got {cut(repr(value))}")
    return value
