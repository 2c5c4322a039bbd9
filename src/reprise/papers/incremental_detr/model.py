"""The detector: Deformable DETR (2010.04159) with a class-specific input projection and class head.

Legend: B images, Q queries, C class outputs, N decoder layers, L feature levels, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from reprise.nn.backbone import Backbone
from reprise.nn.mlp import MLP
from reprise.nn.position import SinePosition2d, downsample_mask
from reprise.papers.incremental_detr.transformer import DeformableTransformer, TransformerOutput, refine

# The paper's finding: which parts know classes, and so are all that the later stages change.
Trainable = Literal["class_head", "projection_and_class_head", "projection_and_heads", "all"]
PARTS: dict[str, tuple[str, ...]] = {
    "class_head": ("class_embed",),
    "projection_and_class_head": ("class_embed", "input_proj"),
    "projection_and_heads": ("class_embed", "input_proj", "bbox_embed"),
}
PRIOR = 0.01  # of every class at the start (focal loss, Lin et al. 2017)


class Features(NamedTuple):
    """What the backbone gives.

    Attributes:
        stages: feature maps, the finest first.
        padding: bool [B, H0, W0] of the images.
    """

    stages: list[Tensor]
    padding: Tensor


class DetectorOutput(NamedTuple):
    """Predictions of every decoder layer (the last one last), and what they were made from.

    Attributes:
        logits: [N, B, Q, C], one sigmoid per class.
        boxes: [N, B, Q, 4] cxcywh in [0, 1], relative to the image without padding.
        projected: the transformer's inputs [B, D, H_l, W_l] of each level.
        paddings: bool [B, H_l, W_l]; positions: [B or 1, D, H_l, W_l].
        transformer: everything the transformer gave.
    """

    logits: Tensor
    boxes: Tensor
    projected: list[Tensor]
    paddings: list[Tensor]
    positions: list[Tensor]
    transformer: TransformerOutput


class DeformableDETR(nn.Module):
    """Deformable DETR without its two-stage variant; state-dict keys are the official ones.

    Args:
        backbone: images to feature maps; with one level its last is used, else its last three.
        transformer: encoder and decoder, which say the number of levels.
        num_classes: class outputs (in the second half of stage 1 the last is the class of pseudo objects).
        num_queries: predictions per image.
        box_refinement: each decoder layer corrects the boxes of the one before; heads are then not shared by layers.

    Raises:
        ValueError: two levels (one, or three and more), or a width that 32 groups do not divide.
    """

    def __init__(
        self,
        backbone: Backbone,
        transformer: DeformableTransformer,
        *,
        num_classes: int,
        num_queries: int,
        box_refinement: bool = False,
    ) -> None:
        super().__init__()
        dim, levels, layers = transformer.dim, transformer.levels, transformer.num_layers
        if levels == 2 or (levels > 2 and len(backbone.channels) < 3):
            raise ValueError("feature levels are one, or three (the backbone's last stages) and more")
        if dim % 32:
            raise ValueError(f"the input projection has 32 groups, which do not divide a width of {dim}")
        self.num_classes, self.num_queries = num_classes, num_queries
        self.transformer = transformer
        self.class_embed = nn.ModuleList(_heads(_class_head(dim, num_classes), layers, box_refinement))
        self.bbox_embed = nn.ModuleList(_heads(_box_head(dim), layers, box_refinement))
        self.query_embed = nn.Embedding(num_queries, 2 * dim)
        self.input_proj = nn.ModuleList(_projections(backbone.channels, dim, levels))
        self.backbone = nn.ModuleList([backbone, SinePosition2d(dim // 2, shift=0.5)])
        if box_refinement:
            transformer.decoder.bbox_embed = self.bbox_embed
        with torch.no_grad():  # first boxes are small; later layers correct them, or share the head
            self.bbox_embed[0].get_parameter("layers.2.bias")[2:] = -2.0

    def features(self, image: Tensor, mask: Tensor | None = None) -> Features:
        """What the backbone makes of images float [B, 3, H0, W0]; mask bool [B, H0, W0] (True = padding) or None."""
        padding = torch.zeros_like(image[:, 0], dtype=torch.bool) if mask is None else mask
        return Features(self.backbone[0](image), padding)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """Predict.

        Args:
            image: normalised float [B, 3, H0, W0], padded at the bottom and right.
            mask: bool [B, H0, W0], True = padding; None when nothing is padded.
        """
        return self.detect(self.features(image, mask))

    def detect(self, features: Features) -> DetectorOutput:
        """Predict from what the backbone gave."""
        projected = self.project(features.stages)
        paddings = [downsample_mask(features.padding, level.shape[-2:]) for level in projected]
        positions = [self.backbone[1](padding).to(projected[0].dtype) for padding in paddings]
        made = self.transformer(projected, paddings, positions, self.query_embed.weight)
        starts = [made.init_reference, *made.references[:-1]]
        logits = torch.stack([head(x) for head, x in zip(self.class_embed, made.hidden, strict=True)])
        boxes = [
            refine(head(x).float(), start.float())
            for head, x, start in zip(self.bbox_embed, made.hidden, starts, strict=True)
        ]
        return DetectorOutput(logits.float(), torch.stack(boxes), projected, paddings, positions, made)

    def project(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """The input projection: the last stage, or the last three and coarser maps made from the last."""
        if self.transformer.levels == 1:
            return [self.input_proj[0](stages[-1])]
        projected = [layer(stage) for layer, stage in zip(self.input_proj[:3], stages[-3:], strict=True)]
        source = stages[-1]
        for layer in self.input_proj[3:]:
            projected.append(layer(source))
            source = projected[-1]
        return projected

    def train_only(self, trainable: Trainable) -> None:
        """Freeze all but the named parts (`all`: what the backbone itself lets train, and everything else).

        Raises:
            ValueError: an unknown choice.
        """
        if trainable == "all":
            return
        if trainable not in PARTS:
            raise ValueError(f"trainable is {trainable!r}; choose one of {', '.join(PARTS)}, all")
        self.requires_grad_(False)
        for part in PARTS[trainable]:
            self.get_submodule(part).requires_grad_(True)


def _class_head(dim: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


def _box_head(dim: int) -> MLP:
    """Three layers; the last starts at zero, so that boxes start at their references."""
    head = MLP((dim, dim, dim, 4))
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return head


def _heads(head: nn.Module, layers: int, separate: bool) -> list[nn.Module]:
    """One head for each layer: copies, or the same one under every index."""
    return [copy.deepcopy(head) if separate else head for _ in range(layers)]


def _projections(channels: Sequence[int], dim: int, levels: int) -> list[nn.Sequential]:
    """1x1 convolutions of the stages that are used, then 3x3 with stride 2 for coarser levels; each with group norm."""
    used = list(channels[-1:]) if levels == 1 else list(channels[-3:])
    convolutions = [nn.Conv2d(width, dim, 1) for width in used]
    for index in range(levels - len(used)):
        convolutions.append(nn.Conv2d(used[-1] if index == 0 else dim, dim, 3, stride=2, padding=1))
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
    return [nn.Sequential(convolution, nn.GroupNorm(32, dim)) for convolution in convolutions]
