"""The encoders: `features` is what a probe sees, `head` (set by the framework) makes the contrastive embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from reprise.nn.backbone import ResNetBody

Norm = Callable[[int], nn.Module]


class ResNet(ResNetBody):
    """torchvision's ResNet with any width and norm; state-dict names as there, but `head` for `fc`.

    Args:
        block: "basic" or "bottleneck".
        layers: blocks of the four stages.
        width: channels of the stem (stages have 1, 2, 4 and 8 times as many planes).
        stem: "imagenet" (7x7, stride 2, max-pool), "cifar" (3x3, stride 1) or "cifar_stride" (3x3, stride 2).
        norm: channels to a normalisation layer.
        zero_init_residual: the last norm of each block starts at 0 (MoCo v3).

    Raises:
        ValueError: an unknown stem.
    """

    def __init__(
        self,
        block: Literal["basic", "bottleneck"],
        layers: Sequence[int],
        *,
        width: int = 64,
        stem: str = "imagenet",
        norm: Norm = nn.BatchNorm2d,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(block, layers, width=width, norm=norm)
        if stem not in ("imagenet", "cifar", "cifar_stride"):
            raise ValueError(f"unknown stem {stem!r}; one of imagenet, cifar, cifar_stride")
        if stem != "imagenet":
            self.conv1 = nn.Conv2d(3, width, 3, stride=1 if stem == "cifar" else 2, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()
        self.width = self.channels[-1]
        self.head: nn.Module = nn.Identity()
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                    nn.init.zeros_(last.weight)

    def features(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] to averaged features of the last stage, [B, width]."""
        return self.stages(image)[-1].mean((-2, -1))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))

    @property
    def first_layer(self) -> Tensor:
        """The first weights, which train."""
        return self.conv1.weight


def grid_positions(rows: int, columns: int, width: int, *, temperature: float = 1e4, released: bool = False) -> Tensor:
    """Fixed sines and cosines of each patch's place and a zero class position, [1, 1 + rows * columns, width].

    Channels: sin and cos of the column, then of the row, width / 4 each. The released code counts patches as if the
    grid were stored column after column (`released`): on square grids the axes change places, on others a patch gets
    the position of another one.

    Raises:
        ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a width of {width} is not a multiple of 4")
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    if released:
        column, row = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="ij")
    frequency = temperature ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    angles = [place.flatten().float()[:, None] * frequency for place in (column, row)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, width), table])[None]


class Patches(nn.Module):
    """Patch projection, or a stem of four stride-2 convolutions ("early convolutions") for patches of 16 pixels."""

    def __init__(self, patch: int, width: int, *, conv_stem: bool, norm: Norm) -> None:
        super().__init__()
        if conv_stem and (patch != 16 or width % 8):
            raise ValueError(
                f"the convolutional stem makes patches of 16 pixels and widths divisible by 8, not {patch}"
            )
        self.proj = _conv_stem(width, norm) if conv_stem else nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, N, width], row after row."""
        return self.proj(image).flatten(2).transpose(1, 2)


def _conv_stem(width: int, norm: Norm) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for after in (width // 8, width // 4, width // 2, width):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), norm(after), nn.ReLU(inplace=True)]
        before = after
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1))


class VisionTransformer(nn.Module):
    """ViT with fixed positions and, by default, a random patch projection that never trains (2104.02057, section 4).

    Args:
        image_size: (height, width), or one side of squares.
        patch, width, depth, num_heads, mlp_ratio: sizes; blocks are timm's with layer norm's epsilon 1e-6.
        conv_stem: four convolutions instead of the patch projection; always trained.
        freeze_patches: no gradient for the patch projection ("stop-grad conv1").
        norm: of the convolutional stem.
        released_positions: see `grid_positions`.

    Raises:
        ValueError: patches do not tile the image.
    """

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        patch: int = 16,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        conv_stem: bool = False,
        freeze_patches: bool = True,
        norm: Norm = nn.BatchNorm2d,
        released_positions: bool = False,
    ) -> None:
        super().__init__()
        height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch or breadth % patch:
            raise ValueError(f"patches of {patch} pixels do not tile {height} x {breadth} pixels")
        self.width = width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        positions = grid_positions(height // patch, breadth // patch, width, released=released_positions)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.patch_embed = Patches(patch, width, conv_stem=conv_stem, norm=norm)
        layer_norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth))
        )
        self.norm = layer_norm(width)
        self.head: nn.Module = nn.Identity()
        self._initialise()
        if freeze_patches and not conv_stem:
            self.patch_embed.requires_grad_(False)

    def _initialise(self) -> None:
        """Xavier uniform; query, key and value are three layers of their own; patches as one dense layer."""
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                parts = module.weight.chunk(3) if name.endswith("qkv") else (module.weight,)
                for part in parts:
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        projection = self.patch_embed.proj
        if isinstance(projection, nn.Conv2d):
            bound = math.sqrt(6 / (projection.weight[0].numel() + self.width))
            nn.init.uniform_(projection.weight, -bound, bound)
            assert projection.bias is not None
            nn.init.zeros_(projection.bias)

    def features(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] to the normalised class token, [B, width]."""
        patches = self.patch_embed(image)
        tokens = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(tokens))[:, 0]

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))

    @property
    def first_layer(self) -> Tensor:
        """The first weights of the trunk that can train: the patches', or the first block's attention."""
        first = next(self.patch_embed.parameters())
        if first.requires_grad:
            return first
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.attn.get_parameter("qkv.weight")


Encoder = ResNet | VisionTransformer
