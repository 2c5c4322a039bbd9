"""When data sets are whole: checks of what lies below the data root, by counts, lines or checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from reprise.data import bccd, cifar10, wmt14
from reprise.data.download import Download
from reprise.errors import DataError

Facts = dict[str, int]
Check = Callable[[Path], Facts]


def always(root: Path) -> Facts:
    """Of data that need no files."""
    return {}


def file_counts(name: str, counts: dict[str, int], *, at_least: bool = False) -> Check:
    """A check that a folder of the data root has this many files (or folders) for each pattern."""

    def run(root: Path) -> Facts:
        folder = root / name
        if not folder.is_dir():
            raise DataError(f"{name} is not there", looked_at=folder)
        found = {pattern: sum(1 for _ in folder.glob(pattern)) for pattern in counts}
        wrong = {p: n for p, n in found.items() if (n < counts[p] if at_least else n != counts[p])}
        if wrong:
            told = ", ".join(f"{n} of {counts[pattern]} {pattern}" for pattern, n in wrong.items())
            raise DataError(f"{name} is not complete: {told}", looked_at=folder)
        empty = [
            path for pattern in counts for path in folder.glob(pattern) if path.is_file() and not path.stat().st_size
        ]
        if empty:
            raise DataError(f"{name} has {len(empty)} empty files", looked_at=empty[0])
        return found

    return run


def line_counts(name: str, counts: dict[str, int]) -> Check:
    """A check that text files have this many lines."""

    def run(root: Path) -> Facts:
        for file, count in counts.items():
            path = root / name / file
            if not path.is_file():
                raise DataError(f"{name} is not there", looked_at=path)
            found = path.read_bytes().count(b"\n")
            if found != count:
                raise DataError(f"{name}: {file} has {found} lines, not {count}", looked_at=path)
        return dict(counts)

    return run


def checksums(name: str, downloads: tuple[Download, ...]) -> Check:
    """A check that plain files are those that were published."""

    def run(root: Path) -> Facts:
        for part in downloads:
            path = root / part.place
            if not path.is_file():
                raise DataError(f"{name} is not there", looked_at=path)
            if f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" != part.checksum:
                raise DataError(f"{name}: {path.name} is not the published file", looked_at=path)
        return {"files": len(downloads)}

    return run


def check_cifar10(root: Path) -> Facts:
    """Either of its layouts, complete."""
    layout, folder = cifar10.find_folder(root)
    if layout == "folder":
        counts = {
            f"{split}/{name}/*": cifar10.COUNTS[split] // 10 for split in cifar10.COUNTS for name in cifar10.CLASSES
        }
        found = file_counts(folder.name, counts)(folder.parent)
        return {split: sum(n for key, n in found.items() if key.startswith(split)) for split in cifar10.COUNTS}
    files = [folder / name for names in cifar10.PICKLES.values() for name in names]
    short = [path for path in files if not path.is_file() or path.stat().st_size < 10_000 * 3073]
    if short:
        raise DataError(f"CIFAR-10: {short[0].name} is missing or truncated", looked_at=short[0])
    return dict(cifar10.COUNTS)


def check_bccd(root: Path) -> Facts:
    """Every file that its lists of splits name."""
    for split in bccd.COUNTS:
        bccd.split_files(root / "bccd", split)
    return dict(bccd.COUNTS)


def check_wmt14(root: Path) -> Facts:
    """At least one pair of languages, its evaluation sets complete and the two sides of each file in step."""
    pairs = [pair for pair in wmt14.PAIRS if (root / "wmt14" / pair).is_dir()]
    if not pairs:
        raise DataError("wmt14 is not there", looked_at=root / "wmt14")
    facts: Facts = {}
    for pair in pairs:
        for split, name in wmt14.NAMES.items():
            counts = [_count_lines(root / "wmt14" / pair / f"{name}.{language}") for language in pair.split("-")]
            if counts[0] != counts[1] or counts[0] != wmt14.COUNTS.get(split, counts[0]):
                raise DataError(f"wmt14: {pair}/{name} has {counts[0]} and {counts[1]} lines", looked_at=root / "wmt14")
            facts[f"{pair}/{name}"] = counts[0]
    return facts


def _count_lines(path: Path) -> int:
    if not path.is_file():
        raise DataError(f"wmt14 lacks {path.name}", looked_at=path)
    with path.open("rb") as file:
        return sum(1 for _ in file)
