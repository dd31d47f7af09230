"""Hydra's own sweeper, but that it starts no worker for a run that is finished already."""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins

from experiments.sweep import Sweep

_BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
# Hydra loads its plugins itself: what it holds is another class than what an import gives
_Basic: Any = Plugins.instance().class_name_to_class[_BASIC]


class Remaining(_Basic):
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
