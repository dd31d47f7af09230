"""Runs side by side on one machine, in processes forked from that of the sweep.

What is imported is imported once, which takes seconds; each process keeps its model between runs.
"""

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape, glob
from multiprocessing.process import BaseProcess
from typing import IO, Any

from experiments.tracking.tracker import stop_helper

_NUMBER = 8  # bytes of the number of a job


@contextmanager
def forked(jobs: Sequence[Callable[[], object]], count: int) -> Iterator[Callable[[], None]]:
    """So many processes that share the jobs: each takes the next one until none is left.

    Gives what waits for them, and raises RuntimeError if some were killed. Whatever is raised
    while they compute, such as by Ctrl-C, ends them, and they end their runs.

    Forked, no other thread of this process may hold a lock that jobs need: begin none before.
    """
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()
    processes: list[BaseProcess] = []
    try:
        # one file offset for all: who is killed while he takes a job, keeps no other from the next
        with tempfile.TemporaryFile(buffering=0) as numbers:
            numbers.write(b"".join(number.to_bytes(_NUMBER) for number in range(len(jobs))))
            numbers.seek(0)
            gc.freeze()  # or every fork would search what torch's import has left, and copy it
            for _ in range(count):
                processes.append(context.Process(target=_work, args=(jobs, numbers, os.getpid())))
                processes[-1].start()
            gc.unfreeze()

        def wait() -> None:
            for process in processes:
                process.join()
            if killed := [process.pid for process in processes if process.exitcode]:
                raise RuntimeError(f"of its processes {', '.join(map(str, killed))} died")

        yield wait
    except BaseException:
        begun = [process for process in processes if process.pid is not None]
        for process in begun:
            process.terminate()
        for process in begun:
            process.join()
        raise


def _work(jobs: Sequence[Callable[[], object]], numbers: IO[bytes], parent: int) -> None:
    """Ends with the job at hand where the sweep itself was killed."""
    # Ctrl-C reaches all processes of a terminal, and would come once more from the sweep
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_when_told()
    try:
        with suppress(KeyboardInterrupt):  # the sweep says so
            while os.getppid() == parent and (number := numbers.read(_NUMBER)):
                jobs[int.from_bytes(number)]()
    finally:
        if "wandb" in sys.modules:
            stop_helper()  # a fork ends without what is done at exit


@cache  # a worker needs one
def end_with(sweep: int) -> None:
    """Have this worker end with the process of its sweep: one that is killed may leave it waiting
    for ever for the rest of a job.
    """

    def watch() -> None:
        while os.getppid() == sweep:  # who is no child can be waited for on some systems only
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_jobs(folder: str) -> None:
    """End the jobs of submitit_local with files there; each is named after a child of ours."""
    files = glob(f"{escape(folder).replace('%j', '*')}/[1-9]*_submitted.pkl")
    jobs = {int(os.path.basename(file).partition("_")[0]) for file in files}
    while jobs:
        for job in list(jobs):
            with suppress(ChildProcessError):  # somebody has waited for it
                if os.waitpid(job, os.WNOHANG) == (0, 0):
                    os.kill(job, signal.SIGTERM)  # until the run begins, submitit drops it
                    continue
            jobs.remove(job)
        time.sleep(0.1)  # before they are told again


def end_when_told() -> None:
    """Have SIGTERM interrupt the run of this worker."""
    signal.signal(signal.SIGTERM, _interrupt_once)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = _interrupt_again


def _interrupt_once(number: int, _: object) -> None:
    """Who stops all processes of a group stops the sweep, too, which sends the signal again."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _interrupt_again(lost: Any) -> None:
    """Python ignores what is raised in callbacks, such as those of its imports: it comes later."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.01)  # seconds
    else:
        sys.__unraisablehook__(lost)
