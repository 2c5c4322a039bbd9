"""From a command line to the configuration of one run: recipe, arm, the user's overrides, and what they are called."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from reprise import discovery, paths
from reprise.errors import ConfigError, RepriseError, did_you_mean

if TYPE_CHECKING:
    from reprise.evidence.claims import Arm

# What `smoke=true` means, on top of any recipe; a claim may add overrides of its own (`smoke:` in claim.yaml).
SMOKE = ("steps=4", "val_every=2", "data.batch_size=8", "data.limit=64", "data.eval_batch_size=32")

# Keys that do not change what is computed, so that they change neither the hash nor the name of a run
# (of a trainer the composed values decide, see `_changes`). What is not known to be neutral decides.
NEUTRAL_TRAINER = ("accelerator", "devices", "num_nodes", "strategy", "activation_checkpointing")
NEUTRAL_CALLBACKS = ("checkpoint", "divergence", "gradient_norms", "search")  # they watch
NEUTRAL_DATA = ("workers",)
NEUTRAL = re.compile(
    r"^(hydra([./]|$)|experiment$|arm$|slug$|seed$|smoke$|variant$|logger([./@]|$)|callbacks$|trainer$|threads$"
    rf"|callbacks\.({'|'.join(NEUTRAL_CALLBACKS)})(\.|$)|data\.({'|'.join(NEUTRAL_DATA)})$"
    rf"|trainer\.({'|'.join(NEUTRAL_TRAINER)})(\.|$))"
)
HASHED_KEYS = ("slug", "paper", "data", "optimizer", "schedule", "steps", "val_every", "seed")
# What can be left out where only the trainer's values are wanted.
IRRELEVANT = re.compile(r"^(hydra|seed|logger|callbacks|threads)([./]|$)")
# What an earlier stage shares with the run that continues from it, of all that the user typed.
SHARED_BY_STAGES = re.compile(r"^(seed|smoke|threads|logger|callbacks|trainer)([./@]|$)")
HASHED_TRAINER_KEYS = ("precision", "gradient_clip_val", "accumulate_grad_batches")  # others count where they are set


def register_resolvers() -> None:
    """Resolvers that the configuration files use; safe to call again."""
    OmegaConf.register_new_resolver(
        "cores", lambda: int(os.environ.get("REPRISE_JOBS", os.cpu_count() or 1)), replace=True
    )


def split_override(override: str) -> tuple[str, str]:
    """("key", "value") of a Hydra override, without `+`, `++` or `~`."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


def experiment_of(overrides: Sequence[str]) -> tuple[str, str]:
    """(slug, recipe) that the overrides choose.

    Raises:
        ConfigError: no experiment is named, or there is no such paper or recipe.
    """
    chosen = [split_override(item)[1] for item in overrides if split_override(item)[0] == "experiment"]
    if not chosen:
        raise ConfigError(
            "no experiment is named",
            looked_at="the command line",
            next_step="add experiment=<paper>/<scale>, e.g. experiment=vit/small (`reprise papers` lists them)",
        )
    slug, _, recipe = chosen[-1].partition("/")
    known = discovery.recipes(slug) + [f"ablations/{name}" for name in discovery.ablations(slug)]
    if recipe not in known:
        raise ConfigError(
            f"paper {slug!r} has no recipe {recipe!r}{did_you_mean(recipe, known)}",
            looked_at=paths.experiments_dir() / slug,
            next_step=f"choose one of: {', '.join(known)}",
        )
    return slug, recipe


def arm_of(slug: str, name: str) -> Arm:
    """An arm of the paper's claim.

    Raises:
        ConfigError: the claim has no such arm.
    """
    from reprise.evidence.claims import load_claim

    arms = load_claim(slug).arms
    if name not in arms:
        raise ConfigError(
            f"the claim of {slug!r} has no arm {name!r}{did_you_mean(name, list(arms))}",
            looked_at=discovery.claim_path(slug),
            next_step=f"choose one of: {', '.join(arms)}",
        )
    return arms[name]


def default_arm(slug: str) -> str | None:
    """The first arm of the paper's claim (the paper's method), or None without a claim."""
    from reprise.evidence.claims import load_claim

    return next(iter(load_claim(slug).arms)) if discovery.claim_path(slug).exists() else None


def smoke_overrides(slug: str) -> list[str]:
    from reprise.evidence.claims import load_claim

    return [*SMOKE, *(load_claim(slug).smoke if discovery.claim_path(slug).exists() else ())]


def job_overrides(overrides: Sequence[str]) -> list[str]:
    """The complete, ordered overrides of one run: recipe, arm, smoke, then the user's own, and the variant's name.

    Args:
        overrides: what the user typed for one run (no sweeps).
    """
    slug, recipe = experiment_of(overrides)
    given = dict(split_override(item) for item in overrides)
    arm = given.get("arm") or default_arm(slug)
    head = [f"experiment={slug}/{recipe}", f"slug={slug}"]
    if arm not in (None, "null"):
        chosen = arm_of(slug, arm)
        head += [*chosen.overrides, f"arm={arm}"]
        head += [_start_from(chosen.after, chosen.shares, overrides)] if chosen.after else []
    if given.get("smoke", "false").lower() == "true":
        head += smoke_overrides(slug)
    own = [item for item in overrides if split_override(item)[0] not in ("experiment", "arm")]
    changed = _changes(head, own) if "variant" not in given else []
    return head + own + ([f"variant={variant_name(changed)}"] if changed else [])


def _changes(head: Sequence[str], own: Sequence[str]) -> list[str]:
    """Of the user's overrides those that make the run another one than the claim's.

    A trainer may bring another precision than the recipe's, or the same one typed: the composed values decide.
    """
    changed = [item for item in own if not NEUTRAL.match(split_override(item)[0])]
    of_trainer = [item for item in own if split_override(item)[0].startswith("trainer")]
    if not any(split_override(item)[0] == "trainer" or item in changed for item in of_trainer):
        return changed
    others = [item for item in own if item not in of_trainer and not IRRELEVANT.match(split_override(item)[0])]
    if _trainer_facts((*head, *others, *of_trainer)) == _trainer_facts((*head, *others)):
        return [item for item in changed if item not in of_trainer]
    return [item for item in own if item in changed or split_override(item)[0] == "trainer"]


@functools.lru_cache(maxsize=64)
def _trainer_facts(overrides: tuple[str, ...]) -> str:
    """What of the trainer decides numbers; where nothing can be composed, the overrides (the run itself will say)."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return json.dumps(decisive(compose_job(overrides))["trainer"], sort_keys=True)
    except (RepriseError, HydraException, OmegaConfBaseException):
        return " ".join(overrides)


def _start_from(arm: str, shares: Sequence[str], overrides: Sequence[str]) -> str:
    """The override that names the earlier stage: the claim's own run of `arm`, with the same seed.

    What the user typed of the keys in `shares` belongs to that stage too, which then is a variant.
    """
    keys = [split_override(item)[0] for item in overrides]
    shared = [item for item, key in zip(overrides, keys, strict=True) if _is_shared(key, shares)]
    experiment = next(item for item in overrides if split_override(item)[0] == "experiment")
    stage = job_overrides([experiment, f"arm={arm}", *shared])
    return f"start_from={{arm: {arm}, overrides: [{', '.join(json.dumps(item) for item in stage)}]}}"


def _is_shared(key: str, shares: Sequence[str]) -> bool:
    """Whether an override reaches the earlier stage."""
    return bool(SHARED_BY_STAGES.match(key)) or any(key == name or key.startswith(f"{name}.") for name in shares)


def variant_name(changed: Sequence[str]) -> str:
    """A file-name-safe name of the user's changes; long ones end in a hash."""
    text = ",".join(sorted(changed))
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-")
    if len(name) <= 60:
        return name
    return f"{name[:48]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration of one run from what a user would type (tests, plan, reports)."""
    return compose_job(job_overrides(overrides))


def compose_job(overrides: Sequence[str]) -> DictConfig:
    """The configuration of one run from its complete overrides, inside or outside a Hydra application."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_resolvers()
    application, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(paths.conf_dir()), version_base="1.3"):
            cfg = hydra_compose("train", overrides=list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = application
    return resolve(cfg)


def earlier_stage(cfg: DictConfig) -> DictConfig | None:
    """The configuration of the run from whose final state this one continues, or None."""
    return _composed_once(tuple(cfg.start_from.overrides)) if cfg.start_from else None


@functools.lru_cache(maxsize=64)
def _composed_once(overrides: tuple[str, ...]) -> DictConfig:
    return compose_job(overrides)


def resolve(cfg: DictConfig) -> DictConfig:
    """The same configuration without the `hydra` node and without interpolations; struct mode stays on.

    Raises:
        ConfigError: a mandatory value is missing, or an interpolation names nothing.
    """
    from omegaconf.errors import OmegaConfBaseException

    try:
        container = OmegaConf.to_container(cfg, resolve=False)
        assert isinstance(container, dict)
        plain = {str(key): value for key, value in container.items() if key != "hydra"}
        kept = OmegaConf.create(plain)
        resolved = OmegaConf.to_container(kept, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"the configuration is incomplete: {str(error).splitlines()[0]}", next_step="set the key in the recipe"
        ) from error
    _check_types(resolved)
    result = OmegaConf.create(resolved)
    assert isinstance(result, DictConfig)
    OmegaConf.set_struct(result, True)
    _refuse_unread(kept)
    return result


# Groups whose every key is handed to a constructor, which refuses what it does not know.
_INSTANTIATED = ("paper", "data", "trainer", "logger", "callbacks")


_TYPES: dict[str, tuple[type, ...]] = {
    "slug": (str,),
    "scale": (str,),
    "arm": (str, type(None)),
    "seed": (int,),
    "steps": (int,),
    "val_every": (int, type(None)),
    "smoke": (bool,),
    "variant": (str, type(None)),
    "threads": (int,),
    "compile": (bool,),
    "start_from": (dict, type(None)),
}


def _check_types(resolved: Any) -> None:
    """Top-level values have their types, and counts are positive."""
    for key, kinds in _TYPES.items():
        value = resolved[key]
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        is_wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if not is_wrong and key in ("steps", "val_every", "threads") and value is not None:
            wanted, is_wrong = "1 or more", value < 1
        if is_wrong:
            raise ConfigError(f"{key} must be {wanted}, not {value!r}", looked_at=key, next_step=f"set {key}=...")


def _refuse_unread(cfg: Any) -> None:
    """A key that nothing reads is an error: it is neither a known key nor named by an interpolation."""
    text = json.dumps(OmegaConf.to_container(cfg, resolve=False))
    named = set(re.findall(r"\$\{([A-Za-z_][\w.]*?)\.?(?=\}|\$\{)", text))  # of ${a.${b}.c}: a and b
    unread = [
        path
        for path in _leaves(OmegaConf.to_container(cfg, resolve=False))
        if path.split(".")[0] not in (*_INSTANTIATED, *_TYPES)
        and not any(path == name or path.startswith(f"{name}.") for name in named)
    ]
    if unread:
        raise ConfigError(
            f"nothing reads the configuration key{'s' if len(unread) > 1 else ''} {', '.join(unread)}",
            looked_at="the composed configuration (reprise train ... --cfg job shows it)",
            next_step="remove it, or correct its spelling",
        )


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if isinstance(node, dict) and node:
        return [
            leaf for key, value in node.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [prefix]


def node_paths(node: Any, prefix: str = "") -> list[str]:
    """The dotted paths of all keys below a node, inner ones included."""
    if not isinstance(node, DictConfig):
        return []
    own = [f"{prefix}{key!s}" for key in node]
    return own + [path for key, name in zip(node, own, strict=True) for path in node_paths(node[key], f"{name}.")]


def decisive(cfg: DictConfig) -> dict[str, Any]:
    """What of a configuration decides the numbers of its run, as plain values; earlier stages left out."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    given, callbacks = plain["trainer"], plain.get("callbacks") or {}
    trainer = {key: given.get(key) for key in HASHED_TRAINER_KEYS}
    trainer |= {key: value for key, value in given.items() if key not in NEUTRAL_TRAINER and value is not None}
    facts = {**{key: plain.get(key) for key in HASHED_KEYS}, "trainer": trainer}
    facts["data"] = {key: value for key, value in plain["data"].items() if key not in NEUTRAL_DATA}
    changing = {name: node for name, node in callbacks.items() if name not in NEUTRAL_CALLBACKS}
    return facts | ({"callbacks": changing} if changing else {})


def config_hash(cfg: DictConfig) -> str:
    """16 hex digits over everything that decides the numbers of a run, its earlier stages included."""
    facts = decisive(cfg)
    earlier = earlier_stage(cfg)
    if earlier is not None:
        facts["start_from"] = config_hash(earlier)
    return short_hash(facts)


def short_hash(facts: Any) -> str:
    """16 hex digits over plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def smoked_scale(label: str) -> str | None:
    """The scale whose smoke runs a label names (`smoke`: small, `smoke-public`: public), or None of other labels."""
    name, _, scale = label.partition("~")[0].partition("-")
    return (scale or "small") if name == "smoke" else None


def scale_label(cfg: DictConfig) -> str:
    """The scale as the run folder names it."""
    smoke = "smoke" if cfg.scale == "small" else f"smoke-{cfg.scale}"
    scale = smoke if cfg.smoke else cfg.scale
    return f"{scale}~{cfg.variant}" if cfg.variant else scale


def run_dir(cfg: DictConfig) -> Path:
    """The run folder of a configuration."""
    return paths.runs_dir() / cfg.slug / scale_label(cfg) / (cfg.arm or "default") / f"seed={cfg.seed}"
