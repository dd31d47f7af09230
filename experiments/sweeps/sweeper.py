"""Hydra's own sweeper, but that it starts no worker for a run that is finished already, and does
not compose a second time what is in the plan.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from experiments.sweeps.sweep import Sweep

_BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
# Hydra loads its plugins itself: what it holds is another class than what an import gives
_Basic: Any = Plugins.instance().class_name_to_class[_BASIC]


class _Planned:
    """A config loader that does not compose again what the plan holds."""

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader

    def load_sweep_config(self, master_config: DictConfig, overrides: list[str]) -> DictConfig:
        current = Sweep.current
        config = current.composed(overrides) if current is not None else None
        if config is None:
            return self._loader.load_sweep_config(master_config, overrides)
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class Remaining(_Basic):
    def setup(self, *, hydra_context: HydraContext, **others: Any) -> None:
        current = Sweep.current
        if current is not None and not current.parallel:
            loader: Any = _Planned(hydra_context.config_loader)
            hydra_context = replace(hydra_context, config_loader=loader)
        super().setup(hydra_context=hydra_context, **others)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        if Sweep.current is None:  # with a plan, every job has been composed already
            super().validate_batch_is_legal(batch)

    @staticmethod
    def split_arguments(overrides: list[Override], size: int | None) -> list[list[list[str]]]:
        (jobs,) = _Basic.split_arguments(overrides, None)
        current = Sweep.current
        if current is not None and current.parallel:
            wanted = current.remaining()
            jobs = [job for job, needed in zip(jobs, wanted, strict=True) if needed]
            size = size or current.batch
        return list(_Basic.split_overrides_to_chunks(jobs, size))


def prefer_our_sweeper() -> None:
    """Take the place of Hydra's, which takes no plugin from a package like this one."""
    Plugins.instance().class_name_to_class[_BASIC] = Remaining
