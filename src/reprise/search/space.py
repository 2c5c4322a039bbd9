"""What is searched: Hydra's sweep overrides, read as Optuna's distributions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from reprise.config import default_arm, experiment_of, split_override, variant_name
from reprise.errors import ConfigError
from reprise.evidence.claims import TUNING_SEEDS_FROM

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from optuna.distributions import BaseDistribution

FORMS = "key=interval(1,9), key=tag(log,interval(1e-4,1e-1)), key=int(interval(1,9)), key=range(1,9), key=a,b,c"


@dataclass(frozen=True)
class Space:
    """The parameters of a search by the key of their override, the overrides that stay, and the seeds of a trial."""

    distributions: Mapping[str, BaseDistribution]
    fixed: tuple[str, ...]
    seeds: tuple[int, ...]

    def overrides(self, params: Mapping[str, Any], seed: int) -> list[str]:
        """What a user would type for one run of a trial."""
        return [*self.fixed, *(f"{key}={value}" for key, value in params.items()), f"seed={seed}"]

    def name(self, *more: object) -> str:
        """A folder name: readable, and another one for another search; `more` is what else makes it another."""
        slug, recipe = experiment_of(self.fixed)
        given = dict(split_override(item) for item in self.fixed)
        arm = given.get("arm") or default_arm(slug)
        facts = {key: str(value) for key, value in self.distributions.items()}
        text = json.dumps([sorted(self.fixed), facts, self.seeds, [str(item) for item in more]], sort_keys=True)
        return f"{slug}-{recipe}-{arm}-{variant_name(list(facts))}-{sha256(text.encode()).hexdigest()[:8]}"


def read_space(parsed: Sequence[Override]) -> Space:
    """The space of a command line.

    Raises:
        ConfigError: nothing is searched, a seed is one of the verdict's, or several arms are named.
    """
    distributions, fixed, seeds = {}, [], [TUNING_SEEDS_FROM]
    for override in parsed:
        key = override.get_key_element()
        if key == "seed":
            seeds = _seeds(override)
        elif not override.is_sweep_override():
            fixed.append(override.input_line or "")
        elif key == "arm":
            raise ConfigError(
                "a search tunes one arm", looked_at=override.input_line, next_step="search each arm with equal trials"
            )
        else:
            distributions[key] = _distribution(override)
    if not distributions:
        raise ConfigError("nothing is searched", looked_at="the command line", next_step=f"give ranges: {FORMS}")
    return Space(distributions, tuple(fixed), tuple(seeds))


def no_such_metric(metric: str, logged: Iterable[str]) -> ConfigError:
    """The error of a metric that a run does not log."""
    known = sorted(name for name in logged if name.startswith("val/"))
    return ConfigError(
        f"the run logs no {metric!r}", looked_at="--metric", next_step=f"choose one of: {', '.join(known)}"
    )


def _seeds(override: Override) -> list[int]:
    values = override.sweep_string_iterator() if override.is_sweep_override() else [str(override.value())]
    seeds = [int(value) for value in values]
    if min(seeds) < TUNING_SEEDS_FROM:
        raise ConfigError(
            f"seed {min(seeds)} is not for tuning: seeds below {TUNING_SEEDS_FROM} decide verdicts",
            looked_at=override.input_line,
            next_step=f"search with seeds from {TUNING_SEEDS_FROM} up, e.g. seed={TUNING_SEEDS_FROM},101",
        )
    return seeds


def _distribution(override: Override) -> BaseDistribution:
    from hydra.core.override_parser.types import IntervalSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    if not override.is_interval_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    assert isinstance(sweep, IntervalSweep)
    kind: Any = IntDistribution if isinstance(sweep.start, int) else FloatDistribution
    try:
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)
    except ValueError as error:
        raise ConfigError(str(error), looked_at=override.input_line, next_step=f"forms: {FORMS}") from error
