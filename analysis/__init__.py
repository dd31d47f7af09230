"""Saved runs to tables, figures and pages: `python -m analysis figures|table|page SOURCE...`.

Reads files only. Needs no model, no GPU and no tracker, and knows nothing of how a run is made.
"""

from os import PathLike, fspath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.runs import Runs


def load(*sources: str | PathLike[str]) -> "Runs":
    """Everything finished in the sources, as tidy frames: see `analysis.runs.Runs`.

    Raises analysis.read.saved.SourceError, a sentence, if a source cannot be read or is empty.
    """
    from analysis.read.sources import read  # pandas takes a second: only where runs are read
    from analysis.runs import frames_of

    return frames_of(*read([fspath(source) for source in sources]))
