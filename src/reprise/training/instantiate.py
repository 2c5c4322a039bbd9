"""The one place where configuration becomes objects: only known packages, and every key must be wanted."""

from __future__ import annotations

import functools
import inspect
from types import UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf

from reprise.errors import ConfigError, RepriseError

ALLOWED_TARGETS = (
    "reprise.",
    "torch.optim.",
    "torch.nn.",
    "torchvision.",
    "timm.",
    "torchmetrics.",
    "pytorch_lightning.",
)


def instantiate(config: Any, *, path: str, **extra: Any) -> Any:
    """Build the object that `config` describes, with Hydra's rules (`_target_`, `_partial_`, nested nodes first).

    Args:
        config: a resolved node.
        path: where the node stands in the configuration, for messages.
        extra: further constructor arguments.

    Raises:
        ConfigError: a target outside the allowed packages, a wrong or missing constructor argument (also one that is
            no number where a number is wanted).
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    check_targets(config, path)
    check_values(config, path)
    try:
        return hydra.utils.instantiate(config, _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, RepriseError):
            raise cause from None
        raise ConfigError(_explain(error, config), looked_at=path, next_step=_options(config)) from error


def check_targets(config: Any, path: str) -> None:
    """Refuse every `_target_` that is not in an allowed package."""
    plain = OmegaConf.to_container(config) if isinstance(config, DictConfig | ListConfig) else config
    if isinstance(plain, dict):
        target = plain.get("_target_")
        if target is not None and not str(target).startswith(ALLOWED_TARGETS):
            raise ConfigError(
                f"the target {target!r} is not allowed",
                looked_at=f"{path}._target_",
                next_step=f"use something from {', '.join(ALLOWED_TARGETS)}",
            )
        for key, value in plain.items():
            check_targets(value, f"{path}.{key!s}")
    elif isinstance(plain, list):
        for position, value in enumerate(plain):
            check_targets(value, f"{path}[{position}]")


def check_values(config: Any, path: str) -> None:
    """Refuse a plain value whose type is not the annotated one, before the constructor stumbles over it.

    Only annotations made of `int`, `float`, `bool`, `str`, `None` and classes are looked at.

    Raises:
        ConfigError: names the key, the value and what is wanted.
    """
    plain = OmegaConf.to_container(config) if isinstance(config, DictConfig | ListConfig) else config
    if isinstance(plain, dict):
        wanted = _annotated(str(plain.get("_target_", "")))
        for key, value in plain.items():
            _check_value(value, wanted.get(str(key), ()), f"{path}.{key!s}")
            check_values(value, f"{path}.{key!s}")
    elif isinstance(plain, list):
        for position, value in enumerate(plain):
            check_values(value, f"{path}[{position}]")


def _check_value(value: Any, kinds: tuple[type, ...], place: str) -> None:
    fits = type(value) in kinds or (type(value) is int and float in kinds) or object in kinds
    if not kinds or fits or not isinstance(value, str | int | float | bool | None):
        return
    key = place.removeprefix("paper.") if place.startswith(("paper.optimizer.", "paper.schedule.")) else place
    named = [_NAMES[kind] for kind in kinds if kind in _NAMES]
    raise ConfigError(f"{key} must be {' or '.join(named)}, not {value!r}", looked_at=key, next_step=f"set {key}=...")


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_PLAIN = {"int": int, "float": float, "bool": bool, "str": str}


@functools.cache
def _annotated(target: str) -> dict[str, tuple[type, ...]]:
    """The arguments of a target that are annotated with plain types, and those types."""
    from hydra._internal.utils import _locate

    try:
        parameters = inspect.signature(_locate(target)).parameters.values()
    except Exception:  # there is no target, or a wrong one, which instantiation reports
        return {}
    found = {parameter.name: _kinds(parameter.annotation) for parameter in parameters}
    return {name: kinds for name, kinds in found.items() if set(kinds) & set(_NAMES)}


def _kinds(annotation: Any) -> tuple[type, ...]:
    """The classes of an annotation, `float | None` for example; none where it says more than classes can."""
    if isinstance(annotation, str):
        words = [word.strip() for word in annotation.split("|")]
        if not set(words) <= {*_PLAIN, "None"}:
            return ()
        return tuple(_PLAIN.get(word, type(None)) for word in words)
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(members) if all(isinstance(member, type) for member in members) else ()


def _explain(error: Exception, config: Any) -> str:
    cause = error.__cause__ or error
    where = next((line for line in str(error).splitlines() if line.startswith("full_key")), "")
    return f"cannot build {config.get('_target_')!s}: {type(cause).__name__}: {cause}" + (
        f" ({where})" if where else ""
    )


def _options(config: Any) -> str | None:
    """The constructor's own arguments, as a hint."""
    from hydra.utils import get_object

    try:
        signature = inspect.signature(get_object(config["_target_"]))
    except (ImportError, ValueError, TypeError):
        return None
    return f"its options are: {', '.join(signature.parameters)}"
