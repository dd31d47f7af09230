"""Hydra's plugin for sweeps: the cells of a grid, of which only those not finished are submitted.

Hydra loads this file in every program of its environment: it imports nothing heavy by itself.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write


class Remaining(Sweeper):
    """Hands a sweep to the command, which is the task function: it knows what is finished."""

    def __init__(
        self,
        max_batch_size: int | None,
        processes: int | str,
        params: Mapping[str, str] | None,
    ) -> None:
        self._params = params or {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._context = hydra_context
        self._config = config
        self._command: Any = task_function

    def sweep(self, arguments: list[str]) -> None:
        loader = self._context.config_loader
        words = [*(f"{key}={value}" for key, value in self._params.items()), *arguments]
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
        self._command.sweep(self._config, self._jobs(cells(overrides)), self._launch)

    def _jobs(self, grid: list[list[str]]) -> list[tuple[list[str], DictConfig]]:
        """The words of each cell, and what they compose to.

        Composing takes as long as a short run: cells that differ in plain values share it.
        """
        loader = self._context.config_loader
        # each asked once: both take long, and cells have most words in common
        parse = functools.cache(OverridesParser.create(config_loader=loader).parse_override)
        options = functools.cache(loader.get_group_options)
        composed: dict[tuple[str, ...], DictConfig] = {}
        jobs = []
        for words in grid:
            plain = {
                word: override
                for word, override in zip(words, map(parse, words), strict=True)
                if override.type is OverrideType.CHANGE
                and not isinstance(override.value(), dict)  # would be merged with another cell's
                and not options(override.key_or_group)
            }
            choices = tuple(plain[word].key_or_group if word in plain else word for word in words)
            if choices not in composed:
                composed[choices] = found = loader.load_sweep_config(self._config, words)
                if found.hydra.sweeper.params != self._config.hydra.sweeper.params:
                    raise HydraException(
                        f"experiment={found.hydra.runtime.choices['experiment']} varies settings by"
                        " itself: it needs a sweep of its own"
                    )
                with read_write(found), open_dict(found):
                    del found["hydra"]  # a job sees none of Hydra's own settings
            config = copy.deepcopy(composed[choices])
            for override in plain.values():
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
            jobs.append((words, config))
        return jobs

    def _launch(self, job: TaskFunction, batch: Sequence[Sequence[str]], first: int) -> None:
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self._context, task_function=job, config=self._config
        )
        for done in launcher.launch(batch, initial_job_idx=first):
            _ = done.return_value  # raises what a job has raised


def cells(overrides: Sequence[Override]) -> list[list[str]]:
    """Every combination of the values that are asked for; the first setting varies slowest."""
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        values: list[str] = []
        if not override.is_sweep_override():
            values = [override.get_value_element_as_str()]
        elif override.is_discrete_sweep():
            with suppress(ValueError, HydraException):  # a range whose step is 0
                values = list(override.sweep_string_iterator())
        if not values:
            said = "a grid needs a list, or a range that has values and whose step is not 0"
            raise HydraException(f"{override.input_line}: {said}")
        choices[key] = [f"{key}={value}" for value in values]
    return [list(cell) for cell in itertools.product(*choices.values())]
