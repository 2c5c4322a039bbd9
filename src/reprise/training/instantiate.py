"""The one place where configuration becomes objects: only known packages, and every key must be wanted."""

from __future__ import annotations

import inspect
from typing import Any

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
        ConfigError: a target outside the allowed packages, a wrong or missing constructor argument.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    check_targets(config, path)
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
