"""What the ranks of a run leave in its folder for each other and for the process that started them.

Rank 0 owns the folder: it prepares it and says how the run ended. The others wait for it by looking at run.json, which
needs no process group, so that it works before there is one and after a rank has died.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from reprise.errors import InterruptedRunError, RepriseError
from reprise.training.runfolder import RANK_ERRORS, RunFolder, write_json

PATIENCE_SECONDS = 600.0


def await_start(folder: RunFolder, config_hash: str, start: str) -> bool:
    """Wait until rank 0 of the same start has prepared the folder; True where the run is finished already.

    Raises:
        RepriseError: rank 0 has failed before this rank had come so far.
    """

    def has_begun() -> bool:
        run = folder.read("run.json") or {}
        return (run.get("config_hash"), run.get("start")) == (config_hash, start)

    _wait(lambda: folder.is_finished(config_hash) or has_begun(), folder, "begun")
    if (folder.read("run.json") or {}).get("status") in ("failed", "interrupted"):
        raise _failed(folder)
    return folder.is_finished(config_hash)


def await_end(folder: RunFolder, config_hash: str) -> None:
    """Wait until rank 0 has written the results, so that a later stage finds them.

    Raises:
        RepriseError: rank 0 could not write them.
    """

    def has_ended() -> bool:
        return (folder.read("run.json") or {}).get("status") in ("finished", "failed", "interrupted")

    _wait(has_ended, folder, "written the results")
    if not folder.is_finished(config_hash):
        raise _failed(folder)


def _failed(folder: RunFolder) -> RepriseError:
    return RepriseError(f"rank 0 has failed: {(folder.read('run.json') or {}).get('error')}", looked_at=folder.path)


def _wait(until: Callable[[], bool], folder: RunFolder, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not until():
        if time.monotonic() > deadline:
            raise RepriseError(
                f"rank 0 has not {what} within {PATIENCE_SECONDS:.0f} seconds",
                looked_at=folder.path / "run.json",
                next_step="see what rank 0 says; all ranks need the same REPRISE_RUNS on a file system that they share",
            )
        time.sleep(0.05)


def text_of(error: BaseException) -> str:
    """What to tell a user."""
    return str(error) if isinstance(error, RepriseError) else f"{type(error).__name__}: {error}"


def write_rank_error(folder: RunFolder, rank: int, error: BaseException) -> None:
    """Leave `error.rank=<n>.json`, from which `first_error` makes the error again."""
    if isinstance(error, KeyboardInterrupt):
        error = InterruptedRunError("stopped before it could save")
    content: dict[str, Any] = {"kind": type(error).__name__, "at": time.time()}
    if isinstance(error, RepriseError):
        looked_at = None if error.looked_at is None else str(error.looked_at)
        content |= {"problem": error.problem, "looked_at": looked_at, "next_step": error.next_step}
    else:
        content |= {"problem": f"rank {rank}: {text_of(error)}"}
    with contextlib.suppress(OSError):  # a full disk must not hide the first error
        write_json(folder.path / RANK_ERRORS.replace("*", str(rank)), content)


def first_error(folder: RunFolder) -> RepriseError | None:
    """The error that explains the end of the ranks: when one fails, the others lose the connection and fail too.

    A user's error goes before a request to stop, that before any other, and the earlier before the later.
    """
    known = {kind.__name__: kind for kind in _kinds(RepriseError)}
    left = [content for path in folder.path.glob(RANK_ERRORS) if (content := folder.read(path.name))]
    if not left:
        return None

    def order(content: dict[str, Any]) -> tuple[int, float]:
        kind = known.get(content["kind"])
        return (2 if kind is None else int(issubclass(kind, InterruptedRunError)), content["at"])

    first = min(left, key=order)
    return known.get(first["kind"], RepriseError)(
        first["problem"],
        looked_at=first.get("looked_at") or folder.path / "ranks.log",
        next_step=first.get("next_step") or "run the same command again; it continues from the last checkpoint",
    )


def _kinds(base: type[RepriseError]) -> list[type[RepriseError]]:
    return [base, *(kind for child in base.__subclasses__() for kind in _kinds(child))]
