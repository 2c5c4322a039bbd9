"""What a run costs: wall time and processor time."""

from __future__ import annotations

import resource
import time


def cpu_seconds() -> float:
    """Processor time (user and system) of this process so far, and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


class Usage:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self._began, self._cpu = time.monotonic(), cpu_seconds()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def cpu_seconds(self) -> float:
        return cpu_seconds() - self._cpu
