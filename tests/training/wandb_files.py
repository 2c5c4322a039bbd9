"""Reads offline files of W&B back: protocol buffers in a log of LevelDB's format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7


@dataclass
class OfflineRun:
    """What one offline file says."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    stats: int = 0
    exit_code: int | None = None

    def metrics(self) -> dict[tuple[int, str], float]:
        """(step, metric) -> value, of everything but pictures, tables and timing."""
        return {
            (int(row["step"]), name): value
            for row in self.history
            if "step" in row
            for name, value in row.items()
            if not name.startswith(("_", "step", "timing/", "pictures/"))
        }


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, put together from their fragments; a file still being written ends early."""
    content, place, parts = path.read_bytes(), HEADER, b""
    assert content[:4] == b":W&B"
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
        if place + HEADER + length > len(content):
            return
        parts += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def read_offline(path: Path) -> OfflineRun:
    """Everything in an offline file."""
    found = OfflineRun()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= _items(record.run.config.update)
        elif kind == "history":
            found.history.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "stats":
            found.stats += 1
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
