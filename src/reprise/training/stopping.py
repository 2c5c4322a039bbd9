"""What the process of a sweep and those of its jobs know of each other: who began, and that all shall stop."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from reprise import paths
from reprise.errors import InterruptedRunError, PreemptedRunError
from reprise.training.ownership import end_with, is_alive, place
from reprise.training.runfolder import cannot_be_written

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_VARIABLE = "REPRISE_STOP_FILE"  # names a file that says by which signal the sweep was stopped
SWEEP_VARIABLE = "REPRISE_SWEEP"  # place and number of the sweep's process
GRACE_SECONDS = 90.0  # for the jobs of a pre-empted sweep to save; scripts/slurm asks for 120 seconds in all


def kind_of_stop(number: int) -> type[InterruptedRunError]:
    """Ctrl-C is the user's will; the others are pre-emption, which asks for another start."""
    return InterruptedRunError if number == signal.SIGINT else PreemptedRunError


def tell_the_sweep(number: int) -> None:
    """Pass a signal on to all jobs of the sweep, where this process got it for all of them.

    Ctrl-C reaches every process of a terminal; pre-emption of one job is no reason to stop the others.
    """
    name = os.environ.get(STOP_VARIABLE)
    if name and (number == signal.SIGINT or os.environ.get(SWEEP_VARIABLE) == _own_name()):
        with contextlib.suppress(OSError), Path(name).open("x") as file:
            file.write(signal.Signals(number).name)


def stop_of_the_sweep() -> signal.Signals | None:
    """The signal that stopped the sweep that this process belongs to; None where there is none, or it goes on."""
    name = os.environ.get(STOP_VARIABLE)
    if not name:
        return None
    try:
        return signal.Signals[Path(name).read_text() or "SIGINT"]
    except (OSError, KeyError):
        return None


def begin_as_job() -> None:
    """What a job does first: it does not begin for a sweep that has stopped, and does not outlive its sweep.

    Only where the sweep runs on the same machine; on another one a job ends when its cluster says so.

    Raises:
        InterruptedRunError: the sweep was stopped, or has ended.
    """
    if (number := stop_of_the_sweep()) is not None:
        raise kind_of_stop(number)("not started, because the sweep was stopped")
    where, _, pid = os.environ.get(SWEEP_VARIABLE, "").rpartition(" ")
    if where != place() or int(pid) == os.getpid():
        return
    if not is_alive(int(pid)):
        raise InterruptedRunError("not started, because its sweep has ended")
    end_with(int(pid))


class GraceIsOver(BaseException):
    """The jobs of a pre-empted sweep did not end in time."""


class Stop:
    """Whether the sweep shall stop, and by which signal."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.is_forced = False

    @property
    def signal(self) -> signal.Signals | None:
        return None if self.file is None else stop_of_the_sweep()


@contextmanager
def stopping_gently(console: Console) -> Iterator[Stop]:
    """On a signal running jobs save and end, and waiting ones do not start; Ctrl-C twice stops at once.

    From then on Ctrl-C is ignored until the process ends: a third one would hit what is being ended.
    The jobs learn it from a file below the run folders, which also workers on other machines see.

    Raises:
        RepriseError: that folder cannot be written.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    stop = Stop(_stop_file())
    assert stop.file is not None
    try:
        stop.file.parent.mkdir(parents=True, exist_ok=True)
        stop.file.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_be_written(paths.runs_dir(), error) from error
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    os.environ |= {STOP_VARIABLE: str(stop.file), SWEEP_VARIABLE: _own_name()}
    _listen(stop, console)
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            if number != signal.SIGINT or not is_ctrl_c_ignored():
                signal.signal(number, handler)
        if not stop.is_forced:  # else jobs that a cluster starts later shall still find it
            stop.file.unlink(missing_ok=True)
        for name in (STOP_VARIABLE, SWEEP_VARIABLE):
            os.environ.pop(name, None)


def _listen(stop: Stop, console: Console) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        tell_the_sweep(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, stop_at_once)
            console.print("stopping: the running jobs are being saved; Ctrl-C again stops at once")
        else:
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
            console.print(f"stopping by {signal.Signals(number).name}: the running jobs are being saved")

    def stop_at_once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    def on_alarm(number: int, frame: FrameType | None) -> None:
        stop.is_forced = True
        raise GraceIsOver

    for number in SIGNALS:
        signal.signal(number, on_signal)
    signal.signal(signal.SIGALRM, on_alarm)


def is_ctrl_c_ignored() -> bool:
    """Whether a second Ctrl-C is ending this process."""
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def _own_name() -> str:
    return f"{place()} {os.getpid()}"


def _stop_file() -> Path:
    return paths.runs_dir().resolve() / ".stops" / _stop_name(os.getpid())


@functools.cache
def _stop_name(pid: int) -> str:
    """One for the life of a process: its pool keeps workers, with the environment of its first sweep."""
    return f"{place().replace('/', '-')}-{pid}-{time.time_ns()}"
