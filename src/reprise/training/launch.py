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
from types import FrameType

from omegaconf import DictConfig, OmegaConf

from reprise import config as configuration
from reprise.errors import InterruptedRunError, PreemptedRunError, RepriseError
from reprise.training.interrupt import SIGNALS
from reprise.training.run import train
from reprise.training.runfolder import RunFolder, write_atomic


def launch(cfg: DictConfig, *, show_progress: bool = True) -> dict[str, float]:
    """Run a configuration with one process per device of this machine and return its test metrics.

    The earlier stage that it continues from is run first, where it is not finished.
    """
    earlier = configuration.earlier_stage(cfg)
    if earlier is not None:
        launch(earlier, show_progress=show_progress)
    ranks = local_ranks(cfg)
    if ranks == 1 or "RANK" in os.environ:
        return train(cfg, show_progress=show_progress)
    return _launch_ranks(cfg, ranks)


def local_ranks(cfg: DictConfig) -> int:
    """Processes to start on this machine; 1 where a cluster (srun, torchrun) has already started one per device."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return 1
    devices = cfg.trainer.devices
    if isinstance(devices, int):
        return devices
    raise RepriseError(
        f"trainer.devices must be a number, not {devices!r}",
        looked_at="trainer.devices",
        next_step="say how many devices of this machine to use, e.g. trainer.devices=8",
    )


def _launch_ranks(cfg: DictConfig, ranks: int) -> dict[str, float]:
    folder = RunFolder(configuration.run_dir(cfg))
    config_hash = configuration.config_hash(cfg)
    if folder.is_finished(config_hash):
        return (folder.read("summary.json") or {})["metrics"]
    folder.prepare(config_hash)
    path = folder.path / "config.yaml"
    write_atomic(path, OmegaConf.to_yaml(cfg))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--signals-to-handle", ",".join(number.name for number in SIGNALS)]
    command += ["-m", "reprise.training.worker", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cfg.threads)}
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    code, asked = _wait_and_forward_signals(child)
    summary, run = folder.read("summary.json"), folder.read("run.json") or {}
    if code == 0 and summary:
        return summary["metrics"]
    raise _kind_of_end(run.get("exit_code"), asked)(
        run.get("error") or f"the processes of the run ended with code {code}",
        looked_at=folder.path,
        next_step="run the same command again; it continues from the last checkpoint",
    )


def _kind_of_end(exit_code: int | None, asked: int | None) -> type[RepriseError]:
    """The error that says how the ranks ended: by rank 0's own account, or by the signal that came before it began."""
    if exit_code is None and asked is not None:
        return InterruptedRunError if asked == signal.SIGINT else PreemptedRunError
    known: list[type[RepriseError]] = [InterruptedRunError, PreemptedRunError]
    return next((kind for kind in known if kind.exit_code == exit_code), RepriseError)


def _wait_and_forward_signals(child: subprocess.Popen[bytes]) -> tuple[int, int | None]:
    """The exit code of the child, and the last signal that it was sent."""
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        os.killpg(child.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        return child.wait(), asked[-1] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
