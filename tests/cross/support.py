"""What the cross-paper tests share: the collected papers, smoke configurations, reference runs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from omegaconf import DictConfig

from reprise import config as configuration
from reprise import discovery
from reprise.evidence import children
from reprise.evidence.children import write_config
from reprise.evidence.claims import load_claim
from tests.cross.probes import Probe

PAPERS = discovery.papers()
RECIPES = [(slug, recipe) for slug in PAPERS for recipe in discovery.recipes(slug)]
ABLATIONS = [(slug, f"ablations/{name}") for slug in PAPERS for name in discovery.ablations(slug)]
ARMS = [(slug, arm) for slug in PAPERS for arm in load_claim(slug).at("small").arms]
# The paper's method (the first arm) and every earlier stage that it continues from.
STAGES = [
    (slug, arm) for slug in PAPERS for claim in [load_claim(slug)] for arm in claim.stages(next(iter(claim.arms)))
]
EVERY_STEP = "callbacks.checkpoint.every_steps=1"


def smoke_config(slug: str, *overrides: str) -> DictConfig:
    """The smoke run of a paper's small recipe."""
    return configuration.compose([f"experiment={slug}/small", "smoke=true", *overrides])


def spread(index: int) -> str:
    """The paper that bears the `index`-th rare case in every test run; the others bear it in `make test-dist`."""
    return PAPERS[index % len(PAPERS)]


def in_every_run(chosen: bool, *values: object) -> object:
    """A test parameter; exhaustive unless it is chosen."""
    return pytest.param(*values, marks=() if chosen else pytest.mark.exhaustive)


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: its configuration, that as a file, its run folder, and what a probe kept of it."""

    cfg: DictConfig
    config: Path
    runs: Path
    run: Path
    probe: Path

    def give_earlier_stages(self, runs: Path) -> Path:
        """The place of this run below `runs`, where the finished runs it continues from lie already."""
        earlier = configuration.earlier_stage(self.cfg)
        while earlier is not None:
            source = folder_of(earlier, self.runs)
            target = runs / source.relative_to(self.runs)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source, target_is_directory=True)
            earlier = configuration.earlier_stage(earlier)
        return runs / self.run.relative_to(self.runs)


def folder_of(cfg: DictConfig, runs: Path) -> Path:
    """The run folder of a configuration below `runs`."""
    return runs / configuration.run_dir(cfg).relative_to(configuration.paths.runs_dir())


class RefusedError(AssertionError):
    """A run ended at once with a clear message."""


@dataclass
class References:
    """Runs that several tests compare with, each made once; an earlier stage is shared by those that continue."""

    folder: Path
    made: dict[tuple[object, ...], Reference] = field(default_factory=dict)

    def __call__(self, slug: str, arm: str, *overrides: str, empty_half: bool = False) -> Reference:
        """The run of an arm in one process.

        Raises:
            RefusedError: the paper refuses the overrides, with a clear message.
        """
        key = (slug, arm, *overrides, empty_half)
        if key not in self.made:
            cfg = smoke_config(slug, f"arm={arm}", EVERY_STEP, *overrides)
            folder = self.folder / f"{len(self.made)}"
            runs = folder / "runs" if empty_half else self.folder / "runs"
            config = write_config(cfg, folder)
            ended = children.run(config, runs, before=Probe(folder / "probe", empty_half))
            if ended.code and "Traceback" not in ended.messages and overrides:
                raise RefusedError(f"{slug} refuses {', '.join(overrides)}: {ended.messages.splitlines()[0]}")
            assert ended.code == 0, ended.messages
            self.made[key] = Reference(cfg, config, runs, folder_of(cfg, runs), folder / "probe")
        return self.made[key]


def metrics_of(run: Path) -> dict[tuple[int, str], float]:
    """The rows of metrics.csv."""
    with (run / "metrics.csv").open() as handle:
        return {(int(row["step"]), row["metric"]): float(row["value"]) for row in csv.DictReader(handle)}


# A fresh interpreter, as for a user; the lines in `fault` may break it at a chosen moment.
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
    """Run a configuration in a fresh interpreter, with its run folders under `runs`."""
    environment = {**os.environ, "REPRISE_RUNS": str(runs)}
    command = [sys.executable, "-c", CHILD.format(fault=fault), str(config)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
