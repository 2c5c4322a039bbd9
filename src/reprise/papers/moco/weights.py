"""Official checkpoints: v1/v2 (`module.encoder_q.*`), v3 (`module.base_encoder.*`) and the CIFAR-10 demo's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reprise.errors import CheckpointError
from reprise.nn.state import fitting_state

KEPT = ("encoder_q.", "base_encoder.")  # the encoders that are used after pre-training
DEMO = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4", "9": "head"}


def import_weights(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """An official pre-training state as a state dict of `model` (a `MoCo` or a `MoCoV3`).

    Raises:
        CheckpointError: for keys left over on either side, or shapes that differ.
    """
    source = {our_name(key): value for key, value in state.items()}
    return fitting_state(source, model.state_dict(), looked_at="the MoCo checkpoint", next_step=_hint(source))


def import_backbone(state: Mapping[str, Any], encoder: nn.Module) -> dict[str, Tensor]:
    """The kept encoder of an official pre-training state, without its head, as a state dict of `encoder`'s trunk.

    What main_lincls.py and main_lincls of v3 load: only the entries of `encoder.head` may be missing.

    Raises:
        CheckpointError: no encoder in the file, or keys left over on either side.
    """
    named = {our_name(key): value for key, value in state.items()}
    source = {key.split(".", 1)[1]: value for key, value in named.items() if key.startswith(KEPT)}
    if not source:
        raise CheckpointError(
            "the file holds no MoCo encoder",
            looked_at=", ".join(sorted(named)[:3]),
            next_step="use a pre-training checkpoint of facebookresearch/moco or moco-v3",
        )
    own = {key: value for key, value in encoder.state_dict().items() if not key.startswith("head.")}
    trunk = {key: value for key, value in source.items() if not key.startswith("head.")}
    return fitting_state(trunk, own, looked_at="the MoCo checkpoint", next_step=_hint(named))


def our_name(key: str) -> str:
    """Our name of an official entry."""
    key = key.removeprefix("module.").removeprefix("model.")  # DistributedDataParallel's; our own checkpoints'
    key = {"queue": "queue.keys", "queue_ptr": "queue.position"}.get(key, key)
    key = re.sub(r"^(\w*encoder\w*)\.fc\.", r"\1.head.", key)
    return re.sub(r"^(encoder_[qk])\.net\.(\d+)\.", lambda found: f"{found[1]}.{DEMO[found[2]]}.", key)


def official_name(key: str, *, residual: bool, demo: bool = False) -> str:
    """The official name of one of our entries; `residual`: the encoder is a ResNet."""
    key = {"queue.keys": "queue", "queue.position": "queue_ptr"}.get(key, key)
    if demo:
        back = {ours: number for number, ours in DEMO.items()}
        return re.sub(r"^(encoder_[qk])\.(\w+)\.", lambda found: f"{found[1]}.net.{back[found[2]]}.", key)
    return re.sub(r"^(\w*encoder\w*)\.head\.", r"\1.fc.", key) if residual else key


def _hint(source: Mapping[str, Any]) -> str:
    if any(key.startswith("base_encoder.") for key in source):
        return "this is a v3 checkpoint: paper.model.framework=in_batch, with the network and sizes it was trained with"
    return "this is a v1/v2 checkpoint: paper.model.framework=queue, with paper.model.queue.mlp as it was trained"
