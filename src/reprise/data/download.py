"""Downloads with checksums: fetched with pooch, unpacked safely, put in place only when they are what they should."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from reprise.data.archives import safe_extract
from reprise.errors import DataError


@dataclass(frozen=True)
class Download:
    """A file or an archive and where it goes.

    Attributes:
        url: plain http(s).
        checksum: `md5:...` or `sha256:...` of the file; None only where `tree` is given.
        place: below the data root, of the file, or of the unpacked folder.
        member: None for a plain file; else the archive's folder that goes to `place` ("" for all of it).
        tree: `tree_digest` of the unpacked folder.
    """

    url: str
    checksum: str | None
    place: str
    member: str | None = None
    tree: str | None = None


def tree_digest(folder: Path) -> str:
    """SHA-256 over the relative names and the SHA-256 of all files below a folder, in order of name."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def obtain(part: Download, root: Path) -> Path:
    """Download, verify, unpack and put in place; interrupted or failed attempts leave nothing behind.

    Raises:
        DataError: the server cannot be reached, the checksum differs, the archive is unsafe, or the disk is full.
    """
    place = root / part.place
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=root))
    except OSError as error:
        raise DataError(
            f"the data root cannot be written: {error}", looked_at=root, next_step="set REPRISE_DATA to another folder"
        ) from error
    try:
        file = _download(part, work, place)
        arrived = file if part.member is None else _unpacked(part, file, work / "unpacked")
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            shutil.rmtree(place)
        arrived.replace(place)
        return place
    except OSError as error:
        raise DataError(
            f"{part.place} cannot be put in place: {error}", looked_at=place, next_step="free some space and try again"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(part: Download, work: Path, place: Path) -> Path:
    import pooch
    import requests

    name = part.url.rsplit("/", 1)[-1]
    try:
        bar = sys.stderr.isatty()
        return Path(pooch.retrieve(part.url, known_hash=part.checksum, fname=name, path=work, progressbar=bar))
    except requests.RequestException as error:
        raise DataError(
            f"{name} cannot be downloaded: {type(error).__name__}",
            looked_at=part.url,
            next_step=f"check the network, or bring it by hand to {place}",
        ) from error
    except ValueError as error:
        raise DataError(
            f"{name} is not the file it should be: its checksum differs",
            looked_at=part.url,
            next_step="try again later; if it stays so, the source has changed",
        ) from error


def _unpacked(part: Download, file: Path, work: Path) -> Path:
    safe_extract(file, work)
    folder = work / (part.member or "")
    if not folder.is_dir():
        raise DataError(f"{file.name} has no folder {part.member!r}", looked_at=part.url, next_step="report this")
    if part.tree is not None and tree_digest(folder) != part.tree:
        raise DataError(f"the files in {file.name} are not those they should be", looked_at=part.url)
    return folder
