"""Official checkpoints of all stages (their state lies under `model`); our parameter names are the official ones.

Stage 1a and 1b store one network; 1b's class head has one more row, for pseudo objects. Stage 2 stores two: the novel
model under the usual names, and its frozen teacher with `_base` after the first part of the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from reprise.nn.state import fitting_state

Branch = Literal["novel", "base"]
SHARED = "query_embed"  # has no copy for the teacher
REFINEMENT = "transformer.decoder.bbox_embed."  # the box heads once more, where the decoder refines boxes


def import_weights(state: Mapping[str, Any], model: nn.Module, branch: Branch = "novel") -> dict[str, Tensor]:
    """The official state as a state dict of `model`, checked key by key.

    Args:
        state: of an official checkpoint of any stage.
        model: a `DeformableDETR`; where its class head has one row fewer than the file's, the row of the pseudo
            objects is left out (stage 1b to stage 2).
        branch: which network of a stage-2 file; a stage-1 file gives both the same.

    Raises:
        CheckpointError: for keys left over on either side, or shapes that differ.
    """
    source = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    own = model.state_dict()
    chosen = one_branch(source, branch)
    copies = {key for key in chosen if key.startswith(REFINEMENT) and key not in own}  # of `bbox_embed`
    return fitting_state(
        without_pseudo_class({key: value for key, value in chosen.items() if key not in copies}, own),
        own,
        looked_at="the Incremental-DETR checkpoint",
        next_step="choose the backbone, the numbers of layers and levels and paper.model.box_refinement accordingly",
    )


def one_branch(source: Mapping[str, Tensor], branch: Branch) -> dict[str, Tensor]:
    """One network of a stage-2 state dict under the usual names; a stage-1 state dict as it is."""
    teacher = {key: value for key, value in source.items() if key.partition(".")[0].endswith("_base")}
    if not teacher or branch == "novel":
        return {key: value for key, value in source.items() if key not in teacher}
    shared = {key: value for key, value in source.items() if key.startswith(f"{SHARED}.")}
    return shared | {
        key.replace("_base.", ".", 1).replace(REFINEMENT[:-1] + "_base.", REFINEMENT): value
        for key, value in teacher.items()
    }


def without_pseudo_class(source: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The class heads of `source` without their last row, where they have exactly one more than those of `own`."""
    cut = dict(source)
    for key, value in source.items():
        if key.startswith("class_embed.") and key in own and len(value) == len(own[key]) + 1:
            cut[key] = value[:-1]
    return cut
