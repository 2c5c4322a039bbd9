"""Jobs of a sweep on Ray: started again when their worker or node dies, stopped gently, never one for all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from rich.console import Console

from reprise import paths
from reprise.config import register_resolvers
from reprise.errors import ConfigError, InterruptedRunError, RepriseError
from reprise.training.stopping import stop_of_the_sweep

OBJECT_STORE_BYTES = 100 * 2**20  # jobs exchange configurations and metrics only
CARRIED = ("REPRISE_", "OMP_NUM_THREADS", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DIR")


@dataclass(frozen=True)
class RayJob:
    """All that a worker needs to run one job as if it ran here."""

    config: DictConfig
    context: HydraContext
    task_function: TaskFunction
    resources: Mapping[str, float]
    singletons: Mapping[Any, Any] = field(default_factory=Singleton.get_state)
    environment: Mapping[str, str] = field(default_factory=lambda: _environment())
    working_dir: Path = field(default_factory=Path.cwd)

    @classmethod
    def of(cls, number: int, config: DictConfig, context: HydraContext, task_function: TaskFunction) -> RayJob:
        """The job of a composed configuration (with its `hydra` node)."""
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        return cls(config, context, task_function, resources_of(config))

    @property
    def name(self) -> str:
        cfg = self.config
        return f"{cfg.slug}/{cfg.scale} {cfg.arm} seed={cfg.seed}"


def resources_of(config: DictConfig) -> dict[str, float]:
    """What the ranks of a job use on their machine: a GPU each, or `threads` CPUs each."""
    devices = config.trainer.devices
    if not isinstance(devices, int):
        raise ConfigError(
            f"trainer.devices must be a number, not {devices!r}",
            looked_at="trainer.devices",
            next_step="say how many devices of a machine a job uses, e.g. trainer.devices=8",
        )
    if config.trainer.accelerator == "cpu":
        return {"CPU": float(devices * config.threads)}
    return {"CPU": float(devices), "GPU": float(devices)}


def run_on_ray(jobs: Sequence[RayJob], *, address: str | None, max_retries: int) -> list[JobReturn]:
    """Run the jobs and return what each handed back, in their order.

    Args:
        jobs: what to run.
        address: of a running cluster; None starts one with the cores of this machine and ends it afterwards.
        max_retries: how often a job is started again when its worker or node died.

    Raises:
        RepriseError: Ray is not installed, there is no such cluster, or no node can ever run a job.
    """
    ray = import_ray()
    with _cluster(ray, address):
        _refuse_what_fits_nowhere(ray, jobs, may_grow=address is not None)
        remote = ray.remote(_run)
        started = [
            remote.options(
                name=job.name,
                num_cpus=job.resources["CPU"],
                num_gpus=job.resources.get("GPU", 0),
                max_retries=max_retries,
            ).remote(job)
            for job in jobs
        ]
        _wait(ray, started)
        return [_outcome(ray, job, reference, max_retries) for job, reference in zip(jobs, started, strict=True)]


def import_ray() -> ModuleType:
    """Ray, without its reports to the makers.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "ray is not installed",
            looked_at="hydra/launcher=ray",
            next_step="pip install -c constraints.txt -e '.[ray]'",
        ) from error
    return ray


@contextmanager
def _cluster(ray: ModuleType, address: str | None) -> Iterator[None]:
    """Joined to a cluster, or with one of our own, while the body runs."""
    own = {"num_cpus": _cores(), "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **(own if address is None else {}))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RepriseError(
            f"the Ray cluster cannot be reached: {error}",
            looked_at=address or "this machine",
            next_step="`ray status` on a node of it shows the cluster; hydra.launcher.address=null starts one here",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _cores() -> int:
    return int(os.environ.get("REPRISE_JOBS", os.cpu_count() or 1))


def _refuse_what_fits_nowhere(ray: ModuleType, jobs: Sequence[RayJob], *, may_grow: bool) -> None:
    """A job that no node has the devices for would wait for ever; but a joined cluster may grow."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for job in jobs:
        if any(all(node.get(kind, 0) >= amount for kind, amount in job.resources.items()) for node in nodes):
            continue
        wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in job.resources.items())
        message = f"{job.name} asks for {wanted} on one node, and no node of the Ray cluster has as many"
        if not may_grow:
            raise RepriseError(
                message,
                looked_at="trainer.devices, threads",
                next_step="use fewer devices, or join a larger cluster with hydra.launcher.address=HOST:PORT",
            )
        Console(stderr=True).print(f"{message}; it waits until one joins")


def _run(job: RayJob) -> JobReturn:
    """Runs in the worker."""
    os.environ.update(job.environment)
    os.chdir(job.working_dir)
    register_resolvers()
    setup_globals()
    Singleton.set_state(dict(job.singletons))
    HydraConfig.instance().set_config(job.config)
    return run_job(
        hydra_context=job.context,
        task_function=job.task_function,
        config=job.config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _wait(ray: ModuleType, references: Sequence[Any]) -> None:
    """Until all are over; after Ctrl-C the running ones are told to save and the waiting ones do not start."""
    pending, told = list(references), False
    while pending:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=1.0)
        if pending and not told and stop_of_the_sweep() is not None:
            told = True
            for reference in pending:
                ray.cancel(reference, force=False)


def _outcome(ray: ModuleType, job: RayJob, reference: Any, max_retries: int) -> JobReturn:
    from reprise.app import Failure

    try:
        return ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        problem: RepriseError = InterruptedRunError("stopped with the sweep")
    except ray.exceptions.RayTaskError as error:
        problem = RepriseError(f"the job could not begin or hand back its result: {error.cause}", looked_at=job.name)
    except ray.exceptions.RayError as error:
        problem = RepriseError(
            f"the job's worker or node died, also after {max_retries} new starts: {str(error).strip().splitlines()[0]}",
            looked_at=job.name,
            next_step="run the same command again; it continues from the last checkpoint",
        )
    return JobReturn(status=JobStatus.COMPLETED, _return_value=Failure(problem, str(problem)))


def _environment() -> dict[str, str]:
    """What a worker must know, with folders that mean the same on every node."""
    carried = {key: value for key, value in os.environ.items() if key.startswith(CARRIED)}
    return carried | {"REPRISE_RUNS": str(paths.runs_dir().resolve()), "REPRISE_ROOT": str(paths.root())}
