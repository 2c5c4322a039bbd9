"""Unpacking downloaded archives: nothing lands outside the target, nothing but plain files and folders is made."""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from reprise.errors import DataError

MAX_BYTES = 400 << 30  # of all files together
MAX_FILES = 5_000_000
MAX_RATIO = 200  # unpacked / packed: beyond this (and 64 MiB) an archive is a bomb


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    is_folder: bool


def safe_extract(archive: Path, target: Path, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> list[Path]:
    """Unpack a tar (of any compression) or zip archive into `target`, all of it or nothing.

    It is unpacked beside the target first; existing files of the same name are replaced at the end. Refused are members
    with absolute paths or `..`, links, devices and the like, and archives that would unpack to more than the limits.

    Returns:
        The top-level files and folders, as they lie in `target`.

    Raises:
        DataError: the archive is damaged or refused, or the disk is full.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=target))
        try:
            _unpack(archive, partial, max_bytes, max_files)
            return [_move(path, target / path.name) for path in sorted(partial.iterdir())]
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (zlib.error, lzma.LZMAError) as error:  # of damaged streams
        raise _refused(archive, f"is damaged: {error}") from error
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, ValueError, RuntimeError) as error:
        raise _refused(archive, f"cannot be unpacked: {error}") from error


def _refused(archive: Path, reason: str) -> DataError:
    return DataError(
        f"the archive {archive.name} {reason}", looked_at=archive, next_step="remove it and fetch the data set again"
    )


def _unpack(archive: Path, partial: Path, max_bytes: int, max_files: int) -> None:
    limit = min(max_bytes, max(64 << 20, MAX_RATIO * archive.stat().st_size))
    done = 0
    for count, (member, content) in enumerate(_members(archive), 1):
        place = partial / _checked_name(archive, member.name)
        if count > max_files:
            raise _refused(archive, f"holds more than {max_files} files")
        if member.is_folder:
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            while block := content.read(1 << 20):
                done += len(block)
                if done > limit:
                    raise _refused(archive, f"unpacks to more than {limit >> 20} MiB")
                file.write(block)
        if place.stat().st_size != member.size:
            raise _refused(archive, f"is truncated at {member.name}")


def _checked_name(archive: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not name or "\\" in name or ":" in name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in parts:
        raise _refused(archive, f"has a member with an unsafe path: {name!r}")
    return Path(*parts)


def _members(archive: Path) -> Iterator[tuple[_Member, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
    elif tarfile.is_tarfile(archive):
        yield from _tar_members(archive)
    else:
        raise _refused(archive, "is neither a tar nor a zip archive")


def _zip_members(archive: Path) -> Iterator[tuple[_Member, IO[bytes]]]:
    with zipfile.ZipFile(archive) as package:
        for info in package.infolist():
            mode = info.external_attr >> 16
            if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(archive, f"has a member that is not a file or folder: {info.filename}")
            with package.open(info) as content:
                yield _Member(info.filename, info.file_size, info.is_dir()), content


def _tar_members(archive: Path) -> Iterator[tuple[_Member, IO[bytes]]]:
    import io

    with tarfile.open(archive) as package:
        for info in package:
            if not (info.isreg() or info.isdir()):
                raise _refused(archive, f"has a member that is not a file or folder: {info.name}")
            yield _Member(info.name, info.size, info.isdir()), package.extractfile(info) or io.BytesIO()


def _move(source: Path, place: Path) -> Path:
    """Put a file or a folder in place, merging folders."""
    if source.is_dir() and place.is_dir() and not place.is_symlink():
        for path in source.iterdir():
            _move(path, place / path.name)
    else:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        source.replace(place)
    return place
