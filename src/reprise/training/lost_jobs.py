"""Jobs that a cluster loses under submitit: each is a failure of its own, and the others are waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from hydra.core.utils import JobReturn, JobStatus

from reprise.app import Failure
from reprise.errors import RepriseError

SUBMITIT = "hydra_plugins.hydra_submitit_launcher"


@contextmanager
def lost_jobs_handed_back(launcher: Any) -> Iterator[None]:
    """While the body launches with submitit, a job without a result hands back a `Failure`.

    Hydra's launcher collects one result after the other, and submitit raises for a job that is lost: at the first one
    the sweep would end and leave the others running, known to nobody. The launcher has no place for another way of
    collecting, so the collecting is replaced here, for as long as it launches.
    """
    if not type(launcher).__module__.startswith(SUBMITIT):
        yield
        return
    from submitit.core import core, utils

    results = core.Job.results

    def results_or_failure(job: Any) -> list[Any]:
        try:
            return list(results(job))
        except (utils.UncompletedJobError, utils.FailedJobError) as error:
            return [_lost(job, error)]

    with patch.object(core.Job, "results", results_or_failure):
        yield


def _lost(job: Any, error: Exception) -> JobReturn:
    problem = RepriseError(
        f"the cluster lost the job (killed, out of memory, or its node died): {str(error).strip().splitlines()[0]}",
        looked_at=job.paths.stderr,
        next_step="run the same command again; it continues from the last checkpoint",
    )
    return JobReturn(status=JobStatus.COMPLETED, _return_value=Failure(problem, f"{problem}\n\n{error}"))
