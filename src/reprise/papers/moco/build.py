"""From configuration to a framework with its encoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from reprise.nn.batch_norm import SplitBatchNorm, SyncBatchNorm
from reprise.papers.moco.encoders import Norm, ResNet, VisionTransformer
from reprise.papers.moco.model import Framework, MoCo, MoCoV3


def build(
    *,
    framework: str,
    network: str,
    norm: str,
    splits: int,
    resnet: Callable[..., ResNet],
    vit: Callable[..., VisionTransformer],
    queue: Callable[..., MoCo],
    in_batch: Callable[..., MoCoV3],
    as_released: bool = False,
) -> Framework:
    """The chosen framework around the chosen network; the other factories are not called.

    Args:
        framework: "queue" (v1 and v2) or "in_batch" (v3).
        network: "resnet" or "vit".
        norm: batch norm of the ResNet and of the convolutional stem: "batch" (each process for itself), "split" (in
            `splits` groups of the global batch) or "sync" (over the global batch).
        as_released: interleaved groups (the CIFAR-10 demo) and positions as v3's code counts them.

    Raises:
        ValueError: an unknown name.
    """
    norms: dict[str, Norm] = {
        "batch": nn.BatchNorm2d,
        "split": partial(SplitBatchNorm, splits=splits, interleaved=as_released),
        "sync": SyncBatchNorm,
    }
    for name, known in ((framework, ("queue", "in_batch")), (network, ("resnet", "vit")), (norm, tuple(norms))):
        if name not in known:
            raise ValueError(f"unknown choice {name!r}; one of {', '.join(known)}")
    encoder = resnet(norm=norms[norm]) if network == "resnet" else vit(norm=norms[norm], released_positions=as_released)
    return queue(encoder) if framework == "queue" else in_batch(encoder)
