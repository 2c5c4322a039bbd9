"""Who may write a run folder: one process at a time, and none that outlives whoever started it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reprise.errors import RunInUseError
from reprise.training.runfolder import cannot_be_written, now

WAIT_SECONDS = 15.0  # longer than the children of a killed run (workers of its loaders) hold its lock
LOOK_EVERY = 0.5  # seconds between two looks at the process that this one shall not outlive
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
logger = logging.getLogger(__name__)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder while the body runs.

    The lock lies beside the folder, which may be moved aside, and is the kernel's: it ends with the process.

    Raises:
        RunInUseError: another process goes on writing there.
        RepriseError: the place cannot be written.
    """
    path = lock_of(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_be_written(folder, error) from error
    try:
        _acquire(descriptor, path, folder)
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def lock_of(folder: Path) -> Path:
    """The file that the writer of a run folder locks."""
    return folder.with_name(f".{folder.name}.lock")


def _acquire(descriptor: int, path: Path, folder: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise _held(path, folder) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            return logger.warning("%s: no locks on this file system; start no run twice at once", folder.parent)


def _held(path: Path, folder: Path) -> RunInUseError:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        holder = {}
    pid, host = holder.get("pid", "unknown"), holder.get("host", "unknown")
    return RunInUseError(
        f"process {pid} on {host} is running this run already, since {holder.get('since', 'unknown')}",
        looked_at=folder,
        next_step=f"wait for its end, or end it (`kill {pid}` on {host}: it saves first), then run the command again",
    )


def _sign(descriptor: int) -> None:
    """Say who holds the lock; a full disk must not hinder the run here."""
    content = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now()})
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content.encode(), 0)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and is not collected yet does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True
    return state not in "ZX"


def place() -> str:
    """Where a process number means the same process: the machine, and the container on it."""
    try:
        return f"{socket.gethostname()}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


@functools.cache
def end_with(pid: int) -> None:
    """From now on this process ends, at once, when `pid` or its own parent does: who is killed tells nobody.

    What is lost is what a kill loses: the steps since the last checkpoint.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and is_alive(pid):
            time.sleep(LOOK_EVERY)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="reprise-end-with", daemon=True).start()
