"""Commands in processes of their own, forked from one that has already imported what they need.

A fresh interpreter takes seconds to import torch and pandas. A fork has streams, an environment, a
process group and an end of its own all the same: it is killed, waited for and limited like any
other. What is imported when, and how Python itself sets up its streams, only a fresh one can show.

Run as a script, this is the process that forks.
"""

import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]
# of others only: what is the project's own is imported by each command, as ever; nor W&B, whose
# forks would share a folder for media, which the first that ends removes
HEAVY = ("torch", "safetensors.torch", "hydra", "pandas", "pyarrow.parquet", "tiktoken", "pydantic")
LONGEST = 2**17  # bytes of a request


class Forked:
    """A command at work, with what tests need of ``subprocess.Popen``."""

    def __init__(self, report: socket.socket, *streams: int) -> None:
        self.returncode: int | None = None
        self._report, self._streams = report, streams
        self._said: list[bytes] | None = None
        self.pid = int(report.recv(64))

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} has not ended")
            self._end()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and error, once nobody writes to them any more."""
        end = None if timeout is None else time.monotonic() + timeout
        if self._said is None:
            said = {stream: b"" for stream in self._streams}
            with selectors.DefaultSelector() as open_streams:
                for stream in said:
                    open_streams.register(stream, selectors.EVENT_READ)
                while open_streams.get_map():
                    ready = open_streams.select(None if end is None else end - time.monotonic())
                    if not ready:
                        raise TimeoutError(f"process {self.pid} has not ended")
                    for key, _ in ready:
                        part = os.read(key.fd, 2**16)
                        said[key.fd] += part
                        if not part:
                            open_streams.unregister(key.fd)
            for stream in said:
                os.close(stream)
            self._said = list(said.values())
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        out, err = (part.decode() for part in self._said)
        return out, err

    def kill(self) -> None:
        """With all processes of its group, if it has not ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(self.pid, signal.SIGKILL)
        self.communicate()

    def _end(self) -> None:
        self.returncode = int(self._report.recv(64))
        self._report.close()


class Forker:
    """The process that forks, seen from the tests."""

    def __init__(self, *flags: str, imports: Sequence[str] = HEAVY) -> None:
        """``flags`` of Python, and the modules that all forks find imported."""
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-m", "tests.forked", str(theirs.fileno()), *imports],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,  # Python sets up its streams once, and forks have pipes
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        with self._process:
            self._process.wait()

    def start(
        self, words: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> Forked:
        """Python with these words, ``-m MODULE ...`` or ``-c PROGRAM ...``, in a new session."""
        ours, report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        request = {"words": words, "env": dict(env or os.environ), "cwd": str(cwd)}
        with report, open(os.devnull, "rb") as nothing:
            ends = [nothing.fileno(), out_end, err_end, report.fileno()]
            socket.send_fds(self._channel, [json.dumps(request).encode()], ends)
        os.close(out_end)
        os.close(err_end)
        return Forked(ours, out, err)

    def run(
        self,
        words: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        timeout: float = 300.0,
    ) -> "subprocess.CompletedProcess[str]":
        """The same to its end."""
        process = self.start(words, env=env, cwd=cwd)
        try:
            out, err = process.communicate(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(words), process.wait(), out, err)


def next_command(channel: socket.socket) -> list[str]:
    """Its words, in a process of its own; where this is called it never returns."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, LONGEST, 4)
        if not message:
            sys.exit()
        if os.fork() == 0:
            channel.close()
            *streams, report = descriptors
            return become(json.loads(message), streams, socket.socket(fileno=report))
        for descriptor in descriptors:
            os.close(descriptor)
        with suppress(ChildProcessError):  # there is none left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def become(request: dict[str, Any], streams: list[int], report: socket.socket) -> list[str]:
    """The words of a request, in a child with all that was asked; this process awaits its end."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        report.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    os.setsid()
    report.send(str(os.getpid()).encode())
    report.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = os.getcwd()
    if "torch" in sys.modules:  # which has read it when it was imported
        sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    words: list[str] = request["words"]
    return words


if __name__ == "__main__":
    for module in sys.argv[2:]:
        import_module(module)
    option, what, *arguments = next_command(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = [option if option == "-c" else what, *arguments]
    if option == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
