"""A Hydra launcher over Ray's core, in which a job that dies with its worker or its node is started again.

The options are explained in `conf/hydra/launcher/ray.yaml`; the work is done in `reprise.training.ray_jobs`.
"""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RayLauncher(Launcher):
    """Runs the jobs of a sweep on a Ray cluster.

    Args:
        address: of a cluster that is there (`auto`, or host:port); None starts one on this machine for the sweep.
        max_retries: how often a job is started again after its worker or its node died.
    """

    def __init__(self, address: str | None, max_retries: int) -> None:
        self.address = address
        self.max_retries = max_retries

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every job; what a dead job hands back is a `reprise.app.Failure`, as for any other failed job."""
        from reprise.training.ray_jobs import RayJob, run_on_ray

        jobs = []
        for index, overrides in enumerate(job_overrides, start=initial_job_idx):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            jobs.append(RayJob.of(index, config, self.context, self.task_function))
        return run_on_ray(jobs, address=self.address, max_retries=self.max_retries)
