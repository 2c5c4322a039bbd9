"""Arrays that are made once and then memory-mapped: atomic, safe between processes, verified, re-made when damaged."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reprise.errors import DataError
from reprise.paths import cache_dir

Arrays = dict[str, npt.NDArray[Any]]
MANIFEST = "manifest.json"


def cached_arrays(name: str, key: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
    """The arrays of `build()`, from the cache folder `<cache>/<name>/<hash of key>` if they are there and whole.

    The arrays are memory-mapped copy-on-write: cheap to open, shared between processes, never written back. Several
    processes that ask at once wait for the one that builds.

    Args:
        name: folder of this kind of data.
        key: everything the arrays depend on (JSON values), with a version of the code that makes them.
        build: makes the arrays.

    Raises:
        DataError: the cache folder cannot be written.
    """
    text = json.dumps(key, sort_keys=True)
    folder = cache_dir() / name / hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
    if (arrays := _load(folder)) is not None:
        return arrays
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if (arrays := _load(folder)) is not None:  # another process made it while we waited
                return arrays
            _store(folder, text, build())
    except OSError as error:
        raise DataError(
            f"the data cache cannot be written: {error}",
            looked_at=folder,
            next_step="free some space or set REPRISE_CACHE to a folder that can be written",
        ) from error
    if (arrays := _load(folder)) is None:
        raise DataError("the data cache does not read back as written", looked_at=folder, next_step="check the disk")
    return arrays


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _store(folder: Path, key: str, arrays: Arrays) -> None:
    """Write into a temporary folder beside the target, then rename; a damaged predecessor is removed."""
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array, allow_pickle=False)
        sums = {name: _checksum(partial / f"{name}.npy") for name in arrays}
        (partial / MANIFEST).write_text(json.dumps({"key": json.loads(key), "arrays": sums}))
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(folder: Path) -> Arrays | None:
    """The arrays of a cache folder, or None if something is missing or does not match its checksum."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())["arrays"]
        if any(_checksum(folder / f"{name}.npy") != expected for name, expected in sums.items()):
            return None
        return {name: np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in sums}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(path: Path) -> int:
    facts = path.stat()
    return _checksum_of(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=256)
def _checksum_of(path: Path, changed: int, size: int) -> int:
    """CRC-32 of a file, computed once in a process for each state of the file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
