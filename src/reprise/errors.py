"""The one kind of error that a user sees: what is wrong, where we looked, what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class RepriseError(Exception):
    """A user-facing failure, shown as one message without a traceback.

    Args:
        problem: what is wrong, naming the thing.
        looked_at: the place that was looked at (a path, a key, a range of steps).
        next_step: what the user can do about it, ideally a command.
    """

    exit_code = 1

    def __init__(self, problem: str, *, looked_at: object = None, next_step: str | None = None) -> None:
        self.problem = problem
        self.looked_at = looked_at
        self.next_step = next_step
        lines = [problem]
        if looked_at is not None:
            lines.append(f"  looked at: {looked_at}")
        if next_step is not None:
            lines.append(f"  next step: {next_step}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:  # survives the trip from a worker process
        return (_rebuild, (type(self), self.problem, self.looked_at, self.next_step))


def _rebuild(cls: type[RepriseError], problem: str, looked_at: object, next_step: str | None) -> RepriseError:
    return cls(problem, looked_at=looked_at, next_step=next_step)


class ConfigError(RepriseError):
    """The configuration names something that does not exist, or that nothing reads."""


class DataError(RepriseError):
    """A data set is missing, truncated, or not what its name says."""


class CheckpointError(RepriseError):
    """A checkpoint or weights file is missing, damaged, or belongs to something else."""


class DivergedError(RepriseError):
    """Training produced a loss that is not finite."""


class RunInUseError(RepriseError):
    """Another process is running the same run; its folder is not this process's to write."""


class InterruptedRunError(RepriseError):
    """The user asked to stop; the run was saved."""

    exit_code = 130


class PreemptedRunError(InterruptedRunError):
    """The scheduler asked to stop (SIGTERM, SIGUSR1); the run was saved and wants to be started again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean a or b?)` with the known names that are close to a mistyped one; empty where none is."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.7)  # dotted keys share much
    return f" (did you mean {' or '.join(close)}?)" if close else ""
