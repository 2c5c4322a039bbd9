"""Which runs may be judged together: those of an arm must have one configuration, up to the seed.

Configurations are read from the run folders' `config.yaml`. What the recipe composes to now is wanted, as soon as any
run of the claim has it; where none has (another checkout, a variant whose overrides are not known), the newest is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from reprise import config as configuration
from reprise import paths
from reprise.discovery import SCALES
from reprise.errors import RepriseError
from reprise.evidence.runs import RunRecord

MARK = 1_987_654_321  # a seed that stands nowhere else: what equals it follows the seed
FOLLOWS = "${seed}"
SEED = re.compile(r"(?<![\w.])seed=\d+")  # in the overrides of an earlier stage, and of the stage before that
UNKNOWN = ""  # of a run whose config.yaml is missing or not readable
Leaf = tuple[str | int, ...]


@dataclass(frozen=True)
class _Wanted:
    """What the recipe composes to for an arm: its key, and the values that follow the seed."""

    key: str
    following: frozenset[Leaf]


def one_configuration_an_arm(
    slug: str, label: str, arms: Sequence[str], finished: Sequence[RunRecord]
) -> tuple[list[RunRecord], list[RunRecord]]:
    """(runs that may be judged together, runs of another configuration).

    Args:
        label: the scale label of the runs.
        arms: of the claim at that scale.
        finished: finished runs, one an arm and seed.
    """
    facts = {run.folder: _facts(run) for run in finished}
    now = {arm: _wanted(slug, label, arm, str(paths.root())) for arm in arms if any(run.arm == arm for run in finished)}
    current = [run for run in finished if _is_current(facts[run.folder], now[run.arm], run.seed)]
    kept = current or [run for arm in arms for run in _newest([r for r in finished if r.arm == arm], facts)]
    return kept, [run for run in finished if run not in kept]


def _is_current(facts: Mapping[str, Any], wanted: _Wanted | None, seed: int | None) -> bool:
    return wanted is not None and bool(facts) and _key(facts, wanted.following, seed) == wanted.key


def _newest(runs: Sequence[RunRecord], facts: Mapping[Any, Mapping[str, Any]]) -> list[RunRecord]:
    """The runs (of one arm) that have the configuration of the one that finished last."""
    leaves = {run.folder: dict(_leaves(facts[run.folder])) for run in runs}
    shared = set.intersection(*map(set, leaves.values())) if leaves else set()
    following = frozenset(
        leaf
        for leaf in shared
        if leaf and str(leaf[-1]).endswith("seed") and all(leaves[run.folder][leaf] == run.seed for run in runs)
    )
    keys = {run.folder: _key(facts[run.folder], following, run.seed) for run in runs}
    last = max(runs, key=lambda run: run.text("finished"), default=None)
    return [run for run in runs if last is not None and keys[run.folder] == keys[last.folder]]


def _facts(run: RunRecord) -> dict[str, Any]:
    """What of a run's config.yaml decides its numbers; empty where the file cannot be read."""
    try:
        cfg = OmegaConf.load(run.folder / "config.yaml")
        assert isinstance(cfg, DictConfig)
        facts = _with_stages(cfg)
        is_stale = cfg.get("start_from") is not None and configuration.config_hash(cfg) != run.text("config_hash")
    except Exception:  # a damaged file, or a configuration of a version that has no such keys or recipes
        return {}
    return {**facts, "of a stage that has changed since": True} if is_stale else facts


def _with_stages(cfg: DictConfig) -> dict[str, Any]:
    facts = configuration.decisive(cfg)
    if cfg.get("start_from") is not None:
        facts["start_from"] = [SEED.sub(FOLLOWS, item) for item in cfg.start_from.overrides]
    return facts


@functools.lru_cache(maxsize=256)
def _wanted(slug: str, label: str, arm: str, root: str) -> _Wanted | None:
    """What the recipe below `root` composes to for an arm now; None for variants and where nothing composes."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    smoked = configuration.smoked_scale(label)
    scale = smoked or label
    if "~" in label or scale not in SCALES:
        return None
    recipe = [f"experiment={slug}/{scale}", *(["smoke=true"] if smoked else [])]
    try:
        facts = _with_stages(configuration.compose([*recipe, f"arm={arm}", f"seed={MARK}"]))
    except (RepriseError, HydraException, OmegaConfBaseException):
        return None
    following = frozenset(leaf for leaf, value in _leaves(facts) if value == MARK)
    return _Wanted(_key(facts, following, MARK), following)


def _key(facts: Mapping[str, Any], following: frozenset[Leaf], seed: int | None) -> str:
    """A hash of the facts in which the values that follow the seed are not told apart."""
    if not facts:
        return UNKNOWN
    values = {str(leaf): FOLLOWS if leaf in following and value == seed else value for leaf, value in _leaves(facts)}
    return configuration.short_hash(values)


def _leaves(node: Any, place: Leaf = ()) -> list[tuple[Leaf, Any]]:
    """Every plain value below a node with the keys that lead there; empty containers are values."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    below = [leaf for key, value in items for leaf in _leaves(value, (*place, key))]
    return below or [(place, node)]
