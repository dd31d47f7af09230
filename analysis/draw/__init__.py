"""Figures: each function takes frames and returns a matplotlib figure."""

import os
from importlib.util import find_spec

# a command that a notebook starts inherits the notebook's backend, which may not be installed here
_BACKEND = os.environ.get("MPLBACKEND", "").partition("module://")[2].partition(".")[0]
if _BACKEND and find_spec(_BACKEND) is None:
    del os.environ["MPLBACKEND"]
