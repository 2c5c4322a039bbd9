"""State dicts of official code: every key must have its place, and every shape must fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reprise.errors import CheckpointError


def fitting_state(
    source: Mapping[str, Any], own: Mapping[str, Tensor], *, looked_at: str, next_step: str
) -> dict[str, Tensor]:
    """The entries of `source` in the order of `own`, checked key by key and shape by shape.

    Args:
        source: a foreign state dict under our key names.
        own: the model's state dict.
        looked_at, next_step: of the message, when keys do not match.

    Raises:
        CheckpointError: for keys left over on either side, or shapes that differ.
    """
    shapes = [
        f"{key}: {tuple(source[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in own.items()
        if key in source and source[key].shape != value.shape
    ]
    sized = "set the number of classes and the sizes as the checkpoint was trained"
    for problem, found, hint in (
        ("the checkpoint has keys that the model lacks", sorted(source.keys() - own.keys()), next_step),
        ("the checkpoint lacks keys of the model", sorted(own.keys() - source.keys()), next_step),
        ("shapes differ", shapes, sized),
    ):
        if found:
            shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise CheckpointError(f"{problem}: {shown}", looked_at=looked_at, next_step=hint)
    return {key: source[key] for key in own}
