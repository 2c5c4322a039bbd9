"""Starts a run with the number of processes it asks for, always from its own resolved configuration file.

Lightning's subprocess launcher repeats `sys.argv`, which under a multirun would start the whole sweep in every rank.
Here a job with several ranks writes `config.yaml` and starts `torchrun` over `python -m reprise.training.worker`, so
it works alike under every Hydra launcher.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import IO

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from reprise import config as configuration
from reprise.errors import InterruptedRunError, RepriseError
from reprise.training.jobs import Job, live_view
from reprise.training.machine import ranks_to_start
from reprise.training.ownership import only_writer
from reprise.training.ranks import first_error
from reprise.training.run import build_first, read_config, train
from reprise.training.runfolder import RunFolder, now, write_atomic
from reprise.training.stopping import SIGNALS, kind_of_stop, tell_the_sweep
from reprise.training.usage import Usage
from reprise.training.worker import LAUNCHER_VARIABLE


def launch(cfg: DictConfig, *, show_progress: bool = True) -> dict[str, float]:
    """Run a configuration with one process per device of this machine and return its test metrics.

    The earlier stage that it continues from is run first, where it is not finished.

    Raises:
        ConfigError: the devices that it asks for are not there.
        RepriseError: of the run; of several ranks the one that explains the others.
    """
    ranks = ranks_to_start(cfg)
    earlier = configuration.earlier_stage(cfg)
    if earlier is not None:
        launch(earlier, show_progress=show_progress)
    if ranks == 1:
        return train(cfg, show_progress=show_progress)
    return _launch_ranks(cfg, ranks, show_progress)


def finished_already(cfg: DictConfig) -> str | None:
    """What to tell a user whose run was finished before, or None where there is something to run."""
    folder = RunFolder(configuration.run_dir(cfg))
    if not folder.is_finished(configuration.config_hash(cfg)):
        return None
    date = (folder.read("run.json") or {}).get("finished")
    text = f"already finished on {date} in {folder.path}; nothing was run"
    kept = folder.path / "config.yaml"
    new = set(cfg.logger) - set(read_config(kept).logger if kept.exists() else ())
    return text + (f" (logger={','.join(sorted(map(str, new)))} applies to new runs only)" if new else "")


def _launch_ranks(cfg: DictConfig, ranks: int, show_progress: bool) -> dict[str, float]:
    folder = RunFolder(configuration.run_dir(cfg))
    config_hash = configuration.config_hash(cfg)
    build_first(cfg, folder, config_hash)
    with only_writer(folder.path):  # rank 0 holds the lock next
        if folder.is_finished(config_hash):
            return folder.metrics()
        folder.prepare(config_hash)
        write_atomic(folder.path / "config.yaml", OmegaConf.to_yaml(cfg))
        cpu_before, usage = folder.used_so_far(folder.read("run.json") or {})[1], Usage()
    with _messages_of_ranks(folder) as log, _progress(cfg, show_progress):
        child = subprocess.Popen(_command(folder, ranks), env=_environment(cfg), stderr=log, start_new_session=True)
        code, asked = _wait_and_forward_signals(child)
    folder.correct(cpu_seconds=round(cpu_before + usage.cpu_seconds, 3))
    if code == 0 and folder.is_finished(config_hash):
        return folder.metrics()
    error = first_error(folder) or _unexplained_end(folder, code, asked)
    status = "interrupted" if isinstance(error, InterruptedRunError) else "failed"
    folder.correct(status=status, finished=now(), error=str(error), exit_code=error.exit_code)
    raise error


def _command(folder: RunFolder, ranks: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--signals-to-handle", ",".join(number.name for number in SIGNALS)]
    return [*command, "-m", "reprise.training.worker", str(folder.path / "config.yaml")]


def _environment(cfg: DictConfig) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(cfg.threads), LAUNCHER_VARIABLE: str(os.getpid())}


@contextmanager
def _messages_of_ranks(folder: RunFolder) -> Iterator[IO[bytes] | None]:
    """`ranks.log`, which takes what each rank says of the same end; None (our own stderr) with REPRISE_TRACEBACK."""
    if os.environ.get("REPRISE_TRACEBACK"):
        yield None
        return
    with (folder.path / "ranks.log").open("wb") as log:
        yield log


def _progress(cfg: DictConfig, show: bool) -> AbstractContextManager[None]:
    return live_view([Job.of_resolved((), cfg)], 0, Console(stderr=True)) if show else nullcontext()


def _unexplained_end(folder: RunFolder, code: int, asked: int | None) -> RepriseError:
    """The ranks left no error: they were stopped before they began, or killed."""
    again = "run the same command again; it continues from the last checkpoint"
    if asked is not None:
        name = signal.Signals(asked).name
        return kind_of_stop(asked)(f"stopped by {name} before the run began", looked_at=folder.path, next_step=again)
    problem = f"the processes of the run ended with code {code}"
    return RepriseError(problem, looked_at=folder.path / "ranks.log", next_step=again)


def _wait_and_forward_signals(child: subprocess.Popen[bytes]) -> tuple[int, int | None]:
    """The exit code of the child, and the last signal that it was sent."""
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        tell_the_sweep(number)
        os.killpg(child.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        return child.wait(), asked[-1] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
