"""Official CLIP state dicts (also those of open_clip's default classes): key names, types, and the sizes they tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reprise.errors import CheckpointError
from reprise.nn.state import fitting_state

# Scalars that the released TorchScript archives carry beside the weights.
SCALARS = ("input_resolution", "context_length", "vocab_size")


def rename(key: str) -> str:
    """Our name of an official tensor: the text tower has a prefix of its own."""
    return key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}"


def import_weights(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The official state as a state dict of `model`, in float32, checked key by key.

    Args:
        state: a state dict under the official names; half precision is widened, the three scalars are dropped, and
            batch norm's counters (unused here) start at zero.
        model: a `CLIP` of the same sizes (`sizes_of` tells them).

    Raises:
        CheckpointError: for keys left over on either side, or shapes that differ.
    """
    given = {rename(key): value for key, value in state.items() if key not in SCALARS and not _is_counter(key)}
    own = model.state_dict()
    weights = {key: value for key, value in own.items() if not _is_counter(key)}
    fitted = fitting_state(given, weights, looked_at="the CLIP checkpoint", next_step=_hint(state))
    counters = {key: value.new_zeros(value.shape, device="cpu") for key, value in own.items() if _is_counter(key)}
    return {key: value.to(own[key].dtype) for key, value in fitted.items()} | counters


def _is_counter(key: str) -> bool:
    """Batch norm's counters, which released files hold or not."""
    return key.endswith("num_batches_tracked")


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of an official state dict, as arguments of `model.clip`; heads follow from the widths.

    Raises:
        CheckpointError: these are not the weights of a CLIP.
    """
    try:
        visual = _vit_sizes(state) if "visual.proj" in state else _resnet_sizes(state)
        return {
            **visual,
            "embed_dim": state["text_projection"].shape[1],
            "context_length": state["positional_embedding"].shape[0],
            "vocab_size": state["token_embedding.weight"].shape[0],
            "text_width": state["ln_final.weight"].shape[0],
            "text_layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
        }
    except KeyError as error:
        raise CheckpointError(f"this is no CLIP: the tensor {error} is missing", looked_at="the checkpoint") from error


def _vit_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    layers = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
    return {"vision_width": width, "vision_patch_size": patch, "image_size": grid * patch, "vision_layers": layers}


def _resnet_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    stages = _count(state, r"visual\.layer(\d+)\.", first=1)
    layers = [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, stages + 1)]
    grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "vision_width": state["visual.conv3.weight"].shape[0],
        "vision_patch_size": None,
        "image_size": grid * 2 ** (stages + 1),
        "vision_layers": layers,
    }


def _count(state: Mapping[str, Tensor], pattern: str, first: int = 0) -> int:
    numbers = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(numbers, default=first - 1) + 1 - first


def _hint(state: Mapping[str, Any]) -> str:
    try:
        return f"its sizes are {sizes_of(state)}; give the same to paper.model (or a variant that has them)"
    except CheckpointError:
        return "it is not an official CLIP state dict"
