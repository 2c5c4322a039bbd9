"""Golden cases: inputs, weights and outputs of official code on disk; `reprise parity` compares ours with them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GoldenCase:
    """What an adapter may see of a golden case: never its outputs.

    Attributes:
        paper, kind: which paper, and which adapter runs it.
        config: every option the official code was run with.
        weights: official state dict (empty for pure functions).
        inputs: tensors by name, without the `in/` prefix.
    """

    paper: str
    kind: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]


# Tables that a case needs and that lie beside its config, not in it: a tokenizer's merges.
BESIDE_CONFIG = ("merges",)

# papers/<slug>/parity.py holds ADAPTERS: dict[str, Adapter], one function per kind.
Adapter = Callable[[GoldenCase], Mapping[str, Tensor]]


@dataclass(frozen=True)
class StoredCase:
    """A case folder: the adapter's view, and the outputs and tolerances that only the comparison reads."""

    path: Path
    case: GoldenCase
    outputs: Mapping[str, Tensor]
    tolerance: Mapping[str, Any]

    def tolerance_of(self, output: str) -> tuple[float, float]:
        """(atol, rtol) of one output: |ours - golden| <= atol + rtol * |golden|."""
        own = self.tolerance.get("by_output", {}).get(output, {})
        return own.get("atol", self.tolerance["atol"]), own.get("rtol", self.tolerance["rtol"])


def find_cases(folder: Path) -> list[Path]:
    """Every case folder at or below `folder`, sorted."""
    return sorted(path.parent for path in folder.rglob("case.json"))


def load_case(folder: Path) -> StoredCase:
    """Read one case folder."""
    from safetensors.torch import load_file

    meta = json.loads((folder / "case.json").read_text())
    tensors = load_file(folder / "io.safetensors")
    weights_file = folder / "weights.safetensors"
    case = GoldenCase(
        paper=meta["paper"],
        kind=meta["kind"],
        config={name: meta[name] for name in BESIDE_CONFIG if name in meta} | meta["config"],
        weights=load_file(weights_file) if weights_file.exists() else {},
        inputs={name.removeprefix("in/"): value for name, value in tensors.items() if name.startswith("in/")},
    )
    outputs = {name.removeprefix("out/"): value for name, value in tensors.items() if name.startswith("out/")}
    return StoredCase(folder, case, outputs, meta["tolerance"])


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient of a leaf after backward, zero where the loss does not depend on it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip to a total norm, where 0 stands for no clipping (as official training engines have it).

    Returns:
        the total norm before clipping, scalar.
    """
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
