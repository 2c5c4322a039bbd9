"""Official DETR checkpoints (.pth: a dict with `model`); our parameter names are the official ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reprise.errors import CheckpointError


def import_weights(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The official state as a state dict of `model`, checked key by key.

    Args:
        state: a whole official checkpoint (with `model`) or its state dict; panoptic ones carry the prefix `detr.`.
        model: a `DETR` or a `DETRSegmentation`.

    Raises:
        CheckpointError: for keys left over on either side, or shapes that differ.
    """
    source = dict(state["model"]) if "model" in state else dict(state)
    source = {key: value for key, value in source.items() if not key.endswith("num_batches_tracked")}
    own = model.state_dict()
    _refuse("the checkpoint has keys that the model lacks", sorted(source.keys() - own.keys()), _hint(source, own))
    _refuse("the checkpoint lacks keys of the model", sorted(own.keys() - source.keys()), _hint(source, own))
    shapes = [
        f"{key}: {tuple(source[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in own.items()
        if source[key].shape != value.shape
    ]
    _refuse("shapes differ", shapes, "set paper.model.num_classes and the sizes as the checkpoint was trained")
    return {key: source[key] for key in own}


def _hint(source: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    panoptic_file = any(key.startswith("mask_head.") for key in source)
    panoptic_model = any(key.startswith("mask_head.") for key in own)
    if panoptic_file and not panoptic_model:
        return "this is a panoptic checkpoint: import it into the model with masks (paper.model.masks=true)"
    if panoptic_model and not panoptic_file:
        return "this is a detector's checkpoint: import it with paper.model.masks=false"
    return "choose the backbone, the numbers of layers and the position encoding that the checkpoint was trained with"


def _refuse(problem: str, found: list[str], next_step: str) -> None:
    if found:
        shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise CheckpointError(f"{problem}: {shown}", looked_at="the DETR checkpoint", next_step=next_step)
