"""A training step apart from Lightning: both networks on all views, and the gradients before the update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import Attention
from torch import Tensor, nn

from reprise.papers.smkd.distillation import Views
from reprise.papers.smkd.model import DistillationNetwork, Projected, patch_weights
from reprise.training.scheduled import clip_each


def view_outputs(
    student: DistillationNetwork,
    teacher: DistillationNetwork,
    global_views: Sequence[Tensor],
    local_views: Sequence[Tensor] = (),
    mask: Tensor | None = None,
    *,
    patches: bool = True,
    attention: bool = False,
) -> Views:
    """The teacher on unmasked global views; the student on masked global views and on unmasked local views.

    Args:
        global_views: two of [B, C, h, w]; local_views: any number of another size.
        mask: bool [2B, h/P, w/P], view by view, or None.
        patches: whether patch tokens are projected (those of local views never are).
        attention: whether the teacher's attention is wanted.
    """
    image = torch.cat(list(global_views))
    with torch.no_grad():
        weight, output = None, None
        if attention:
            tokens, maps = teacher.backbone.with_attention(image)
            weight, output = patch_weights(maps), teacher.project(tokens, patches=patches)
        seen = output or teacher(image, patches=patches)
    explained = student(image, mask, patches=patches)
    hidden = None if mask is None else mask.flatten(1)
    return Views(seen, explained, local_logits(student, local_views), hidden, weight)


def local_logits(student: DistillationNetwork, local_views: Sequence[Tensor]) -> list[Tensor]:
    """Class logits [B, K] of each local view."""
    if not local_views:
        return []
    output: Projected = student(torch.cat(list(local_views)), patches=False)
    return list(output.cls.chunk(len(local_views)))


def cancel_prototype_gradients(head: nn.Module) -> None:
    """Leave the prototypes as they are in this update: no gradient and no weight decay."""
    for name, parameter in head.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


def drop_key_bias_gradients(student: DistillationNetwork) -> None:
    """Zero the gradient of the keys' biases, which is zero but for rounding (softmax does not see what all keys share).

    Adam would turn the rounding into steps of full size that differ between machines and numbers of ranks.
    """
    for module in student.backbone.modules():
        if isinstance(module, Attention) and module.qkv.bias.grad is not None:
            module.qkv.bias.grad.chunk(3)[1].zero_()


def prepare_gradients(student: DistillationNetwork, *, max_norm: float | None, freeze_prototypes: bool) -> None:
    """Clip each parameter's gradient by itself, then drop those of the prototypes where they are frozen."""
    drop_key_bias_gradients(student)
    if max_norm:
        clip_each(student.parameters(), max_norm)
    if freeze_prototypes:
        cancel_prototype_gradients(student)
