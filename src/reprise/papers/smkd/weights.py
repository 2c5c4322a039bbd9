"""Official checkpoints (HL-hanlin/SMKD, iBOT): the `teacher` of two networks is imported; our names are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reprise.nn.state import fitting_state
from reprise.papers.smkd.model import VisionTransformer

STATE_KEYS = ("teacher", "student")  # the released evaluation reads the teacher
NEXT_STEP = "choose the sizes, the patch and the kind of head (paper.model) that the checkpoint was trained with"


def import_weights(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The official state as a state dict of `model`.

    Args:
        state: of a teacher, a student or a bare backbone; of two networks under `teacher.` and `student.` the first is
            taken. A teacher has no mask embedding (it never masks): it becomes zero.
        model: a `DistillationNetwork` or a `VisionTransformer`.

    Raises:
        CheckpointError: for keys left over on either side, or shapes that differ.
    """
    source = dict(_part(state))
    if isinstance(model, VisionTransformer):
        source = {key.removeprefix("backbone."): value for key, value in source.items() if not key.startswith("head.")}
    own = model.state_dict()
    source = {_own_name(key): value for key, value in source.items()}
    for key, value in own.items():
        if key.endswith("masked_embed") and key not in source:
            source[key] = value.new_zeros(value.shape, device="cpu")
    return fitting_state(source, own, looked_at="the SMKD checkpoint", next_step=NEXT_STEP)


def _part(state: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in STATE_KEYS:
        found = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if found:
            return found
    return state


def _own_name(key: str) -> str:
    """A head of one layer is a bare Linear in the official code."""
    return key.replace("head.mlp.weight", "head.mlp.0.weight").replace("head.mlp.bias", "head.mlp.0.bias")
