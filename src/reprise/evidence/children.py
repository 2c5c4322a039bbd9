"""Runs in child processes that may be killed, forked from a warm server: a start costs milliseconds, not imports."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from reprise import discovery
from reprise.errors import RepriseError
from reprise.training.launch import launch
from reprise.training.run import read_config

Before = Callable[[], None]  # what a child does before its run, for example prepare a fault; must be picklable
SHARED_IMPORTS = ("matplotlib.pyplot", "torchmetrics.detection", "reprise.evidence.children")
GRACE_SECONDS = 20.0  # how long the other ranks may go on after one has failed


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (-9: SIGKILL) and what it wrote to stdout and stderr."""

    code: int
    messages: str


@dataclass(frozen=True)
class Rank:
    """A place in a process group; `store` is a file that does not exist yet, where the ranks meet."""

    number: int
    world: int
    store: Path

    def join(self) -> None:
        """Say to Lightning that ranks are there already, and meet them."""
        from torch import distributed

        names = {"RANK": self.number, "LOCAL_RANK": self.number, "GROUP_RANK": 0}
        names |= {"WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.world, "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID=str(self.store))
        distributed.init_process_group(
            "gloo", init_method=f"file://{self.store}", rank=self.number, world_size=self.world
        )


@dataclass(frozen=True)
class Child:
    """A run in a process of its own."""

    process: ForkServerProcess
    log: Path

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.join()

    def wait(self, timeout: float = 300) -> Ended:
        """How it ended; one that takes longer is killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
        assert self.process.exitcode is not None
        return Ended(self.process.exitcode, self.log.read_text(errors="replace"))


def write_config(cfg: DictConfig, folder: Path) -> Path:
    """The configuration as a file for a child."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(OmegaConf.to_yaml(cfg))
    return path


def start(config: Path, runs: Path, *, before: Before | None = None, rank: Rank | None = None) -> Child:
    """Start a configuration with its run folders below `runs`, after doing `before` in the child."""
    handle, log = tempfile.mkstemp(prefix="child-", suffix=".log", dir=config.parent)
    os.close(handle)
    environment = {**os.environ, "REPRISE_RUNS": str(runs)}
    process = _warm_server().Process(target=_main, args=(config, Path(log), environment, before, rank), daemon=False)
    process.start()
    return Child(process, Path(log))


def run(config: Path, runs: Path, *, before: Before | None = None, timeout: float = 300) -> Ended:
    """Run a configuration and wait for its end."""
    return start(config, runs, before=before).wait(timeout)


def run_ranks(
    config: Path, runs: Path, world: int, *, before: Before | None = None, timeout: float = 300
) -> list[Ended]:
    """Run a configuration on `world` ranks; when one fails, the others get a little time and are then killed."""
    with tempfile.TemporaryDirectory(dir=config.parent) as folder:
        ranks = [Rank(number, world, Path(folder) / "store") for number in range(world)]
        children = [start(config, runs, before=before, rank=rank) for rank in ranks]
        _wait_for_all(children, timeout)
        return [child.wait(0) for child in children]


def _wait_for_all(children: list[Child], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(child.process.exitcode is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
        if any(child.process.exitcode for child in children):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


@functools.cache
def _warm_server() -> ForkServerContext:
    """A server that has imported what every run needs, papers included; it must not start threads."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SHARED_IMPORTS, *(f"reprise.papers.{slug}.module" for slug in discovery.papers())])
    return context


def _main(config: Path, log: Path, environment: dict[str, str], before: Before | None, rank: Rank | None) -> None:
    _redirect_output(log)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if before is not None:
            before()
        if rank is not None:
            rank.join()
        launch(read_config(config), show_progress=False)
    except RepriseError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _redirect_output(log: Path) -> None:
    target = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(target, stream)
    os.close(target)
