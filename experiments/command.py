"""How a runner is started: Hydra around it, one sentence for what goes wrong, an exit code.

Exit codes: 0 all done, 1 a run failed, 2 the settings are wrong, 130 interrupted.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.help import overlays, refuse_overlay
from experiments.settings import ConfigError, sentence

CONF = str(Path(__file__).resolve().parent.parent / "conf")


class RunError(RuntimeError):
    """A run that broke off; the message is one sentence for the user."""


class LauncherError(RuntimeError):
    """A launcher broke off with jobs unfinished."""


class Escape(BaseException):
    """Carries an error out of a Hydra callback, where Hydra makes a warning of any Exception.

    Without an error, nothing is left to do.
    """

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(error)
        self.error = error


class Remember(Callback):
    """Keeps the composed configuration, so that the command can say at its end where all went."""

    config: DictConfig | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            hydra = config.hydra
            refuse_overlay(hydra.job.config_name, hydra.runtime.choices.get("experiment"))
        except ConfigError as error:
            raise Escape(error) from None
        Remember.config = config

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Remember.on_run_start(self, config)


@contextmanager
def saying_why() -> Iterator[None]:
    """Around a job: say at once why it broke off, for Hydra hands on a sweep's first error only."""
    try:
        yield
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise


_started_with: str | None = None


def command_line() -> str:
    """The command that a user typed, also in a worker process that a launcher has started."""
    if _started_with is not None:
        return _started_with
    main = sys.modules["__main__"].__spec__
    module = main.name.removesuffix(".__main__") if main is not None else Path(sys.argv[0]).name
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def work_for(command: str) -> None:
    """This process is a worker of that command."""
    global _started_with
    _started_with = command


class _WithoutJobLine:
    """A stream without the line in which Hydra repeats the overrides of a job that failed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if text.startswith("Error executing job with overrides"):
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_command(
    job: Callable[[], Any],
    *,
    after: Callable[[DictConfig], int | None],
    command: str = "converge",
) -> int:
    """Run a Hydra main function; then ``after``, also when jobs of a sweep failed.

    ``after`` may say with a code of its own that not all is done.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on instead of printing them
    code = 0
    try:
        with redirect_stderr(_WithoutJobLine(sys.stderr)):
            job()
    except Escape as escape:
        if escape.error is not None:
            return _never_began(escape.error, command)
    except ConfigError:
        code = 2
    except RunError:
        code = 1
    except LauncherError as error:
        code = _say(str(error), 1)
    except KeyboardInterrupt:
        code = _say("interrupted; the same command carries on", 130)
    except ValueError as error:
        if Remember.config is not None:
            raise
        return _say(f"an override cannot be read: {error}", 2)  # Hydra's, on ``=1``
    except Exception as error:
        return _never_began(error, command)
    if Remember.config is not None:
        found = after(Remember.config)
        code = code or found or 0
    return code


def _never_began(error: Exception, command: str) -> int:
    """One sentence for what is wrong before the first job."""
    if isinstance(error, ConfigError):
        return _say(str(error), 2)
    if isinstance(error, MissingConfigException) and "experiment/" in str(error.missing_cfg_file):
        return _say(sentence(error, options=overlays(command)), 2)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _say(sentence(error), 2)
    if isinstance(error, OSError):
        return _say(f"runs_dir: {error.filename!r} cannot be written ({error.strerror})", 1)
    raise error


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
