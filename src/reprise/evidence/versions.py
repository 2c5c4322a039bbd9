"""Where the versions of runs differ from those that constraints.txt installs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from reprise import paths


def pinned_versions() -> dict[str, str]:
    """Package -> version in constraints.txt; empty without the file."""
    try:
        lines = (paths.root() / "constraints.txt").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    pins = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {_normal(name): version for name, _, version in pins if version}


def other_versions(used: Mapping[str, Sequence[str]]) -> list[str]:
    """What differs, e.g. `torch 2.11.0 instead of 2.14.1`; packages that are not pinned (also Python) are passed over.

    Args:
        used: package -> the versions that runs recorded. A local part (`2.14.1+cu130`) makes no difference.
    """
    pins = pinned_versions()
    differing = {
        name: [version for version in versions if version.partition("+")[0] != pins[_normal(name)]]
        for name, versions in used.items()
        if _normal(name) in pins
    }
    return [
        f"{name} {' / '.join(found)} instead of {pins[_normal(name)]}" for name, found in differing.items() if found
    ]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
