"""Hydra's launchers: which extra each needs, and how the cores are divided among their workers."""

import os
from importlib.util import find_spec
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from experiments.settings import ConfigError

BASIC = "basic"
SUBMITIT_LOCAL = "submitit_local"
SUBMITIT = (SUBMITIT_LOCAL, "submitit_slurm")
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
        )


def workers(launcher: str, options: Any, *, batch: int | None) -> int | None:
    """How many jobs run at a time on this machine; None where others decide.

    ``options`` are those of ``hydra.launcher``, ``batch`` is ``hydra.sweeper.max_batch_size``: left
    alone, submitit_local would start all runs at the same moment.
    """
    if launcher == BASIC:
        return 1
    if launcher == "joblib":
        asked = _whole("hydra.launcher.n_jobs", options.n_jobs)
        if asked == 0:
            raise ConfigError("hydra.launcher.n_jobs must be above 0, or -1 for all cores, got 0")
        return max(1, asked if asked > 0 else cores() + 1 + asked)
    if launcher == SUBMITIT_LOCAL:
        if batch is not None and _whole("hydra.sweeper.max_batch_size", batch) < 1:
            raise ConfigError(f"hydra.sweeper.max_batch_size must be at least 1, got {batch}")
        return batch or cores()
    return None


def threads(launcher: str, options: Any, *, workers: int | None) -> int | None:
    """PyTorch threads of each worker; None leaves PyTorch alone.

    Depends on the settings and the machine only, not on what is left to compute: a sweep that is
    carried on computes with as many threads, hence the same bits, as an undisturbed one.
    """
    if launcher == BASIC:
        return None
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted:
        return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else None
    if launcher == "ray":
        asked = (options.ray.get("remote") or {}).get("num_cpus")
        return max(1, int(asked)) if isinstance(asked, (int, float)) else 1
    if launcher == "submitit_slurm":
        asked = options.get("cpus_per_task")
        return None if asked is None else max(1, _whole("hydra.launcher.cpus_per_task", asked))
    if workers is None:
        return None
    return max(1, cores() // workers)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _whole(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key} must be a whole number, got {value!r}")
    return value
