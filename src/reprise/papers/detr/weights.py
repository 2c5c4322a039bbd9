"""Official DETR checkpoints (their state lies under `model`); our parameter names are the official ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reprise.nn.state import fitting_state


def import_weights(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The official state as a state dict of `model`, checked key by key.

    Args:
        state: of an official checkpoint; panoptic ones carry the prefix `detr.`.
        model: a `DETR` or a `DETRSegmentation`.

    Raises:
        CheckpointError: for keys left over on either side, or shapes that differ.
    """
    source = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    own = model.state_dict()
    return fitting_state(source, own, looked_at="the DETR checkpoint", next_step=_hint(source, own))


def _hint(source: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    panoptic_file = any(key.startswith("mask_head.") for key in source)
    panoptic_model = any(key.startswith("mask_head.") for key in own)
    if panoptic_file and not panoptic_model:
        return "this is a panoptic checkpoint: import it into the model with masks (paper.model.masks=true)"
    if panoptic_model and not panoptic_file:
        return "this is a detector's checkpoint: import it with paper.model.masks=false"
    return "choose the backbone, the numbers of layers and the position encoding that the checkpoint was trained with"
