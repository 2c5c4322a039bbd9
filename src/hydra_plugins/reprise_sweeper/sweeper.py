"""A Hydra sweeper that knows arms and seeds.

It expands sweeps like Hydra's basic sweeper, puts each arm's overrides in place, skips runs that are finished with the
same configuration hash, hands the rest to whatever launcher is configured, and shows all of them live. With
`claim: true` (`reprise reproduce`) missing sweeps over `arm` and `seed` are filled in from the paper's claim.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class RepriseSweeperConf:
    _target_: str = "hydra_plugins.reprise_sweeper.sweeper.RepriseSweeper"
    params: dict[str, Any] = field(default_factory=dict)
    claim: bool = False
    dry_run: bool = False
    search: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="reprise", node=RepriseSweeperConf, provider="reprise")


class RepriseSweeper(Sweeper):
    """Expands, skips, launches, watches.

    Args:
        params: sweeps given by configuration (`hydra.sweeper.params`), as Hydra's basic sweeper has them.
        claim: expand the claim's arms and seeds.
        dry_run: list the jobs and start none.
        search: choose the values of the sweep with Optuna, as these `reprise.search.loop.Settings` say.
    """

    def __init__(self, params: dict[str, Any], claim: bool, dry_run: bool, search: Mapping[str, Any]) -> None:
        self.params = dict(params or {})
        self.claim = claim
        self.dry_run = dry_run
        self.search = dict(search)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run every job; returns a `reprise.training.jobs.SweepOutcome`, or a `SearchOutcome` of a search."""
        from reprise.training.jobs import run_jobs

        if self.search:
            return self._search(arguments)
        jobs = [self._job(combination) for combination in self._combinations(arguments)]
        return run_jobs(jobs, self.launcher, dry_run=self.dry_run, jobs_at_once=self._jobs_at_once())

    def _jobs_at_once(self) -> int | None:
        """What joblib's and Hydra's own launcher run together; None for a cluster, which decides that itself."""
        launcher = self.config.hydra.launcher
        if str(launcher.get("_target_", "")).endswith("BasicLauncher"):
            return 1
        count = launcher.get("n_jobs")
        return count if isinstance(count, int) and count > 0 else None

    def _search(self, arguments: Sequence[str]) -> Any:
        from reprise.search.loop import Settings, run_search
        from reprise.search.space import read_space

        space = read_space(self._parse([item for item in arguments if not _is_hydras(item)]))
        return run_search(Settings(**self.search), space, self._job, self.launcher)

    def _job(self, combination: Sequence[str], added: Sequence[str] = ()) -> Any:
        """One run: what a user would type for it, completed, and what is added to that."""
        from reprise.config import job_overrides
        from reprise.training.jobs import Job

        own = [item for item in combination if not _is_hydras(item)]
        overrides = [*job_overrides(own), *added]
        return Job.of(overrides, self.context.config_loader.load_sweep_config(self.config, overrides))

    def _parse(self, items: Sequence[str]) -> list[Override]:
        return OverridesParser.create(self.context.config_loader).parse_overrides(list(items))

    def _combinations(self, arguments: Sequence[str]) -> list[list[str]]:
        """The product of all sweeps, one list of plain overrides a run."""
        given = [f"{key}={value}" for key, value in self.params.items()]
        typed = {item.lstrip("+~").partition("=")[0] for item in arguments}
        items = [item for item in given if item.lstrip("+~").partition("=")[0] not in typed] + list(arguments)
        if self.claim:
            items += self._claimed(items)
        choices = []
        for override in self._parse(items):
            if override.is_sweep_override():
                key = override.get_key_element()
                choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            else:
                choices.append([override.input_line or ""])
        return [list(combination) for combination in itertools.product(*choices)]

    def _claimed(self, items: Sequence[str]) -> list[str]:
        """Sweeps over the claim's arms and seeds, where the user gave none."""
        from reprise.config import experiment_of, split_override
        from reprise.evidence.claims import load_claim

        slug, recipe = experiment_of(items)
        at_scale = load_claim(slug).at(recipe)
        keys = {split_override(item)[0] for item in items}
        added = []
        if "seed" not in keys:  # seeds outside, arms inside: what is done at any moment is paired
            added.append("seed=" + ",".join(str(seed) for seed in at_scale.seeds))
        if "arm" not in keys:
            added.append("arm=" + ",".join(at_scale.arms))
        return added


def _is_hydras(override: str) -> bool:
    return override.startswith(("hydra.", "hydra/"))
