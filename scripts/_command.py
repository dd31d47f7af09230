"""A function as a script: steady streams, and what went wrong as one sentence."""

from collections.abc import Callable

from stateful_gpt.console import run_command


class Failure(Exception):
    """What went wrong, in one sentence."""


def command(
    name: str, *failures: type[Exception], prefix: str | None = None
) -> Callable[[Callable[[], int | None]], Callable[[], int]]:
    """The exit code of a script: 1 behind the sentence of a Failure or of one of ``failures``."""

    def decorate(body: Callable[[], int | None]) -> Callable[[], int]:
        def guarded() -> int:
            try:
                return body() or 0
            except (Failure, *failures) as error:
                raise SystemExit(f"{prefix or name}: {error}") from error

        return lambda: run_command(name, guarded)

    return decorate
