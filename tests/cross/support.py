"""What the cross-paper tests share: smoke configurations, runs in child processes, comparison of checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from reprise import config as configuration
from reprise import discovery
from reprise.evidence.claims import load_claim

PAPERS = discovery.papers()
RECIPES = [(slug, recipe) for slug in PAPERS for recipe in discovery.recipes(slug)]
ABLATIONS = [(slug, f"ablations/{name}") for slug in PAPERS for name in discovery.ablations(slug)]
# The paper's method (the first arm) and every earlier stage that it continues from.
STAGES = [
    (slug, arm) for slug in PAPERS for claim in [load_claim(slug)] for arm in claim.stages(next(iter(claim.arms)))
]


def smoke_config(slug: str, *overrides: str) -> DictConfig:
    """The smoke run of a paper's small recipe."""
    return configuration.compose([f"experiment={slug}/small", "smoke=true", *overrides])


def write_config(cfg: DictConfig, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(OmegaConf.to_yaml(cfg))
    return path


# A child runs this with a configuration file; the lines in `fault` may break it at a chosen moment.
CHILD = """
import os, signal, sys
from pathlib import Path
from reprise.training.run import read_config
from reprise.training.launch import launch
from reprise.errors import RepriseError
{fault}
try:
    launch(read_config(Path(sys.argv[1])), show_progress=False)
except RepriseError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def run_child(config: Path, runs: Path, *, fault: str = "", timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a configuration in a process of its own, with its run folders under `runs`."""
    environment = {**os.environ, "REPRISE_RUNS": str(runs)}
    return subprocess.run(
        [sys.executable, "-c", CHILD.format(fault=fault), str(config)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def only_run(runs: Path) -> Path:
    """The one run folder below `runs` that no other run continues from."""
    found = {path.parent: OmegaConf.load(path.parent / "config.yaml") for path in runs.rglob("run.json")}
    earlier = {cfg.start_from.arm for cfg in found.values() if cfg.start_from}
    last = [folder for folder, cfg in found.items() if cfg.arm not in earlier]
    assert len(last) == 1, found.keys()
    return last[0]


def copy_earlier_stages(source: Path, target: Path) -> None:
    """Give `target` the finished runs below `source` that its last run continues from."""
    for path in source.rglob("run.json"):
        if path.parent != only_run(source):
            shutil.copytree(path.parent, target / path.parent.relative_to(source))


def final_state(runs: Path) -> dict[str, Any]:
    """The content of the newest checkpoint of the one run."""
    newest = sorted((only_run(runs) / "checkpoints").glob("step=*.ckpt"))[-1]
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


def _bits(tensor: Tensor) -> Tensor:
    """NaNs compare equal when their bits do."""
    kinds = {
        torch.float32: torch.int32,
        torch.float64: torch.int64,
        torch.bfloat16: torch.int16,
        torch.float16: torch.int16,
    }
    return tensor.contiguous().view(kinds[tensor.dtype]) if tensor.dtype in kinds else tensor
