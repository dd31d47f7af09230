"""The two processes that a tracker depends on, seen from outside: W&B's server and its helper.

Nobody waits for either longer than it says here. Knows nothing of runs.
"""

import base64
import json
import netrc
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

PROBE_SECONDS = 2.0
LET_GO_SECONDS = 1.0
QUESTION = b'{"query": "query Viewer { viewer { username } }"}'


def within(
    seconds: float, action: Callable[[], T], *, longer: Callable[[], bool] = lambda: False
) -> T:
    """What ``action`` returns, or raises; whoever waits longer than ``seconds`` goes away.

    ``longer`` is asked each time they have passed: whether to wait as long again.

    Raises:
        TimeoutError: it is not done; its thread is left behind.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(action())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    while thread.is_alive() and longer():
        thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"not done within {seconds:g} s")
    return done[0]


def server_trouble() -> str | None:
    """Why W&B's server cannot be used, in a few words; None when it can."""
    url, key = server_url(), _api_key()
    if key is None and "WANDB_IDENTITY_TOKEN_FILE" not in os.environ:
        return "there is no API key (wandb login makes one known)"
    try:
        answer = within(PROBE_SECONDS, lambda: _ask(url, key))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return f"the server refuses the API key ({error.code})"
        return f"the server fails ({error.code} {error.reason})"
    except TimeoutError:
        return "the server does not answer"
    except (OSError, ValueError) as error:
        return f"the server cannot be reached ({_reason(error)})"
    if key is not None and not (answer.get("data") or {}).get("viewer"):
        return "the server does not know the API key"
    return None


def server_url() -> str:
    """Where W&B's server is, by the environment or W&B's own settings."""
    import wandb  # takes a second: only where it is used

    return str(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).rstrip("/")


def _api_key() -> str | None:
    """From where W&B looks for it: environment, settings, ~/.netrc; it is never asked for."""
    import wandb

    if key := os.environ.get("WANDB_API_KEY") or wandb.setup().settings.api_key:
        return str(key)
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return None
    found = logins.authenticators(urllib.parse.urlsplit(server_url()).hostname or "")
    return found[2] if found else None


def _ask(url: str, key: str | None) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/graphql", data=QUESTION)
    request.add_header("Content-Type", "application/json")
    if key is not None:
        word = base64.b64encode(f"api:{key}".encode()).decode()
        request.add_header("Authorization", f"Basic {word}")
    with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as response:
        answer = json.loads(response.read(1_000_000))
    if not isinstance(answer, dict):
        raise ValueError("its answer is not W&B's")
    return answer


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "reason", error)).split())[:120] or type(error).__name__


def let_go(run: Any = None) -> None:
    """End W&B's helper process, whatever it does for ``run``; the next run gets another one."""
    import wandb

    with suppress(Exception):  # the run's own threads would complain that nobody listens
        run._run_status_checker.stop()
    with suppress(Exception):  # no public way to end it without waiting for its uploads
        wandb.setup()._connection._proc._process.kill()  # type: ignore[union-attr]
    with suppress(BaseException):  # it raises whatever the helper died of, even SystemExit
        within(LET_GO_SECONDS, wandb.teardown)
