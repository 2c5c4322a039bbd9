"""Comparing what runs ended with, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Integers of the same width: NaNs compare equal when their bits do.
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def final_state(run: Path) -> dict[str, Any]:
    """The content of the newest checkpoint of a run folder."""
    newest = max((run / "checkpoints").glob("step=*.ckpt"))
    return torch.load(newest, map_location="cpu", weights_only=True)


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Paths at which two nested states are not bit-identical."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and torch.equal(_bits(left), _bits(right))
        return [] if same else [path]
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{path}: keys {sorted(map(str, left.keys() ^ right.keys()))}"]
        return [found for key in left for found in differences(left[key], right[key], f"{path}/{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return [f"{path}: lengths {len(left)} and {len(right)}"]
        return [
            found for i, pair in enumerate(zip(left, right, strict=True)) for found in differences(*pair, f"{path}/{i}")
        ]
    return [] if left == right else [f"{path}: {left!r} != {right!r}"]


def run_differences(left: Path, right: Path) -> list[str]:
    """Where the final checkpoints and the metrics of two run folders differ."""
    found = differences(final_state(left), final_state(right))
    same = (left / "metrics.csv").read_bytes() == (right / "metrics.csv").read_bytes()
    return found if same else [*found, "metrics.csv"]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS.get(tensor.dtype, tensor.dtype))
