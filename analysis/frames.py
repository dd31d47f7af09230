"""Two views of any frame that has a row for each run, prompt and step, or more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd


def last_step(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of each run's and prompt's last step: of the text as it ended."""
    steps = frame.groupby(["run", "prompt_id"], observed=True)["step"]
    return frame[frame["step"] == steps.transform("max")]


def grouped(frame: pd.DataFrame, by: str | list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Keys and rows, in the order in which they appear."""
    yield from frame.groupby(by, sort=False, observed=True)
