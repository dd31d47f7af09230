"""What happens when a GPT is fed its own estimates: the library.

The way through it: ``load_checkpoint`` → ``generate`` (a prompt, or a given text when nothing is to
be generated) → ``recompute`` → ``model.GPT``. ``trajectory`` is the study of a given text in one
call; ``convergence`` makes numbers of what comes out, ``left_to_right`` computes the fixed point.

Importing the package alone imports no torch.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stateful_gpt.checkpoint import load_checkpoint as load_checkpoint
    from stateful_gpt.feedback import Feedback as Feedback
    from stateful_gpt.generate import generate as generate
    from stateful_gpt.oracle import left_to_right as left_to_right
    from stateful_gpt.recompute import RecomputeConfig as RecomputeConfig
    from stateful_gpt.recompute import recompute as recompute
    from stateful_gpt.trajectory import trajectory as trajectory

_HOMES = {
    "Feedback": "feedback",
    "RecomputeConfig": "recompute",
    "generate": "generate",
    "left_to_right": "oracle",
    "load_checkpoint": "checkpoint",
    "recompute": "recompute",
    "trajectory": "trajectory",
}
__all__ = ["__version__", *_HOMES]

try:
    __version__ = version("stateful_gpt")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


class _Library(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # a module that is imported must not hide the function it is named for
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Library
