"""The sealed part of a RESULTS.md: verdicts as data inside, and a hash that shows a hand edit. Cheap to import."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reprise.errors import ConfigError

_HASH = re.compile(r"<!-- sha256: ([0-9a-f]{64}) -->\n?\Z")
_DATA = re.compile(r"<!-- verdicts\n(.*?)\n-->", re.DOTALL)


def read_results(path: Path) -> dict[str, Any]:
    """The verdicts inside a RESULTS.md as plain data: scale -> fields of `Verdict`; empty without a file.

    Raises:
        ConfigError: the file's data is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    found = _DATA.search(text)
    try:
        return dict(json.loads(found.group(1))) if found else {}
    except ValueError:
        raise ConfigError(
            f"The data in {path.parent.name}/{path.name} is damaged.",
            looked_at=path,
            next_step="`reprise report --write` writes the file anew",
        ) from None


def check_results(path: Path) -> bool:
    """Whether the file is as it was generated: its last line holds the hash of all before it."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    found = _HASH.search(text)
    return found is not None and found.group(1) == _digest(text[: found.start()])


def seal(text: str) -> str:
    """The text with the hash line after it."""
    return f"{text}<!-- sha256: {_digest(text)} -->\n"


def embed(verdicts: Mapping[str, Any]) -> list[str]:
    """Lines of an HTML comment that holds the verdicts as JSON, for `read_results`."""
    encoded = json.dumps(verdicts, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return ["<!-- verdicts", encoded.replace("--", "-\\u002d"), "-->"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
