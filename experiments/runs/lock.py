"""Who may write a run's folder: the process that holds its lock. A killed holder lets go."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without them say
# a folder may come from elsewhere: what a link in it points at stays as it is, and nobody waits
# for the other end of a pipe
_CAUTION = os.O_NOFOLLOW | os.O_NONBLOCK


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder; waits while another process does, and says so.

    On a file system without locks the folder is not held, of which it warns: two processes may then
    compute the same run, each into whole files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _CAUTION, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder} is being computed elsewhere: waiting", flush=True)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                said = f"{folder} is where files have no locks: never start it twice"
                print(f"warning: {said}", file=sys.stderr)
            if not _is_file_at(descriptor, path):
                continue  # the holder before us has removed what we waited for
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def is_held(folder: Path) -> bool | None:
    """Whether a living process holds the run folder; None where there are no locks to ask."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | _CAUTION)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
