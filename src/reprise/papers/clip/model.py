"""CLIP: an image tower and a text tower that embed into one space (figure 3).

Shapes: B items, L tokens, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reprise.papers.clip.resnet import ModifiedResNet
from reprise.papers.clip.transformer import TextTransformer, VisionTransformer, unit

INITIAL_TEMPERATURE = 0.07


@dataclass(frozen=True)
class Sizes:
    """Everything that decides the shapes of a CLIP.

    Attributes:
        embed_dim: of the shared space.
        image_size: pixels; square images.
        vision_layers: blocks of a vision transformer, or the blocks of each stage of a modified ResNet.
        vision_patch_size: None for a modified ResNet.
        vision_heads: None: width / 64 (vision transformer) or width * 32 / 64 (attention pool), as released.
        text_heads: None: width / 64.
    """

    embed_dim: int
    image_size: int
    vision_layers: int | tuple[int, ...]
    vision_width: int
    vision_patch_size: int | None
    text_width: int
    text_layers: int = 12
    text_heads: int | None = None
    vision_heads: int | None = None
    context_length: int = 77
    vocab_size: int = 49408


def _resnet(embed_dim: int, image_size: int, layers: tuple[int, ...], width: int, text_width: int) -> Sizes:
    return Sizes(embed_dim, image_size, layers, width, None, text_width)


def _vit(embed_dim: int, image_size: int, layers: int, width: int, patch: int, text_width: int) -> Sizes:
    return Sizes(embed_dim, image_size, layers, width, patch, text_width)


# Tables 19 and 20 of the paper, and the released weights.
VARIANTS: dict[str, Sizes] = {
    "RN50": _resnet(1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": _resnet(512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": _resnet(640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": _resnet(768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": _resnet(1024, 448, (3, 15, 36, 10), 128, 1024),
    "ViT-B/32": _vit(512, 224, 12, 768, 32, 512),
    "ViT-B/16": _vit(512, 224, 12, 768, 16, 512),
    "ViT-L/14": _vit(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": _vit(768, 336, 24, 1024, 14, 768),
}


class CLIP(nn.Module):
    """Images and token ids to embeddings; similarity is exp(logit_scale) times the cosine.

    Args:
        temperature: initial value of 1 / exp(logit_scale).
        learn_temperature: whether `logit_scale` is trained.
    """

    def __init__(
        self,
        visual: VisionTransformer | ModifiedResNet,
        text: TextTransformer,
        *,
        temperature: float = INITIAL_TEMPERATURE,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn_temperature)

    @property
    def embed_dim(self) -> int:
        """E, of the shared space."""
        return self.text.text_projection.shape[1]

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Unit image and text embeddings, [B, E] each."""
        return unit(self.visual(image)), unit(self.text(text))

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """exp(logit_scale) * cosine of images [B, 3, R, R] with texts [T, L], [B, T]."""
        image_features, text_features = self(image, text)
        return self.logit_scale.exp() * image_features @ text_features.T


def clip(
    variant: str | None = None,
    *,
    temperature: float = INITIAL_TEMPERATURE,
    learn_temperature: bool = True,
    end_token: int | None = -1,
    sync_batch_norm: bool = False,
    **sizes: Any,
) -> CLIP:
    """A CLIP by its published name, by its sizes, or by a name with some sizes replaced (those that are not None).

    Args:
        variant: one of `VARIANTS`, or None when all sizes are given.
        end_token: id of the token at which the text feature is read; -1: the last id of the vocabulary; None: the
            largest id of each text (released code).
        sync_batch_norm: batch norm of ResNets over the batches of all ranks (by default each normalises its own).

    Raises:
        ValueError: no such variant, or sizes are missing or unknown.
    """
    chosen = resolve_sizes(variant, sizes)
    end = chosen.vocab_size - 1 if end_token == -1 else end_token
    return CLIP(
        vision_tower(chosen, sync_batch_norm=sync_batch_norm),
        TextTransformer(
            vocab_size=chosen.vocab_size,
            context_length=chosen.context_length,
            width=chosen.text_width,
            layers=chosen.text_layers,
            heads=chosen.text_heads or max(chosen.text_width // 64, 1),
            embed_dim=chosen.embed_dim,
            end_token=end,
        ),
        temperature=temperature,
        learn_temperature=learn_temperature,
    )


def resolve_sizes(variant: str | None, sizes: Mapping[str, Any]) -> Sizes:
    """The sizes of a variant with those that are given put in their place.

    Raises:
        ValueError: no such variant, or sizes are missing or unknown.
    """
    given = {name: value for name, value in sizes.items() if value is not None}
    if isinstance(given.get("vision_layers"), Sequence):
        given["vision_layers"] = tuple(given["vision_layers"])
        given.setdefault("vision_patch_size", None)
    unknown = given.keys() - Sizes.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"unknown sizes {', '.join(sorted(unknown))}; known: {', '.join(Sizes.__dataclass_fields__)}")
    if variant is not None:
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; one of {', '.join(VARIANTS)}")
        return replace(VARIANTS[variant], **given)
    try:
        return Sizes(**given)
    except TypeError as error:
        raise ValueError(f"without a variant all sizes are needed: {error}") from error


def vision_tower(sizes: Sizes, *, sync_batch_norm: bool = False) -> VisionTransformer | ModifiedResNet:
    """The image tower: a vision transformer where `vision_layers` is a number, else a modified ResNet.

    Raises:
        ValueError: a vision transformer without a patch size, or a ResNet with one.
    """
    if isinstance(sizes.vision_layers, tuple):
        if sizes.vision_patch_size is not None:
            raise ValueError("a modified ResNet has no patches: vision_patch_size must be null")
        stages = len(sizes.vision_layers)
        channels = sizes.vision_width * 4 * 2 ** (stages - 1)
        return ModifiedResNet(
            image_size=sizes.image_size,
            width=sizes.vision_width,
            layers=sizes.vision_layers,
            heads=sizes.vision_heads or max(channels // 64, 1),
            embed_dim=sizes.embed_dim,
            norm=_sync_norm if sync_batch_norm else nn.BatchNorm2d,
        )
    if sizes.vision_patch_size is None:
        raise ValueError("a vision transformer needs vision_patch_size")
    return VisionTransformer(
        image_size=sizes.image_size,
        patch_size=sizes.vision_patch_size,
        width=sizes.vision_width,
        layers=sizes.vision_layers,
        heads=sizes.vision_heads or max(sizes.vision_width // 64, 1),
        embed_dim=sizes.embed_dim,
    )


def _sync_norm(channels: int) -> nn.Module:
    from reprise.nn.batch_norm import SyncBatchNorm

    return SyncBatchNorm(channels)
