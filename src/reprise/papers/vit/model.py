"""The Vision Transformer (section 3.1). Shapes: B images, N patches, T tokens (N, plus the class token), D width."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.layers import Attention, Mlp, lecun_normal_
from torch import Tensor, nn

from reprise.papers.vit.hybrid import ResNetStem
from reprise.papers.vit.positions import POSITIONS, RelativeAttention

NORM_EPS = 1e-6
CLASSIFIERS = ("token", "gap")


@dataclass(frozen=True)
class Sizes:
    """Depth, width D, MLP size and heads of an encoder (table 1)."""

    depth: int
    width: int
    mlp_dim: int
    num_heads: int


SIZES = {
    "Ti": Sizes(12, 192, 768, 3),  # Ti and S are later work (DeiT, AugReg)
    "S": Sizes(12, 384, 1536, 6),  # 12 heads (MoCo v3) would have the same weights and mean something else
    "B": Sizes(12, 768, 3072, 12),
    "L": Sizes(24, 1024, 4096, 16),
    "H": Sizes(32, 1280, 5120, 16),
}
# (units of each ResNet stage, patch size on the feature map): the stem itself reduces the image 16 times
HYBRIDS = {"R50+B/16": ((3, 4, 9), 1)}


class TanhGELU(nn.GELU):
    """GELU in the tanh approximation: Flax's default, so what every released model was trained with."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP with residual connections (equations 2 and 3), from timm's layers.

    Dropout follows the attention's output and both dense layers. With `relative_tokens` (T) the attention knows the
    offsets between tokens.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
        attention_dropout: float,
        relative_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = (
            Attention(width, num_heads, qkv_bias=True, attn_drop=attention_dropout, proj_drop=dropout)
            if relative_tokens is None
            else RelativeAttention(relative_tokens, width, num_heads, attn_drop=attention_dropout, proj_drop=dropout)
        )
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, mlp_dim, act_layer=TanhGELU, drop=dropout)
        self._initialize()

    def _initialize(self) -> None:
        for kernel in (*self.attn.qkv.weight.chunk(3), self.attn.proj.weight):
            nn.init.xavier_uniform_(kernel)  # query, key and value are three layers of their own
        nn.init.zeros_(self.attn.qkv.bias)
        nn.init.zeros_(self.attn.proj.bias)
        for dense in (self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(dense.weight)
            if dense.bias is not None:
                nn.init.normal_(dense.bias, std=1e-6)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))

    def attention_weights(self, x_BTD: Tensor) -> Tensor:
        """Softmax attention of each head for this input, [B, heads, T, T]."""
        batch, tokens, _ = x_BTD.shape
        qkv = self.attn.qkv(self.norm1(x_BTD)).reshape(batch, tokens, 3, self.attn.num_heads, self.attn.head_dim)
        query, key, _ = qkv.permute(2, 0, 3, 1, 4)
        logits = query * self.attn.scale @ key.transpose(-2, -1)
        if isinstance(self.attn, RelativeAttention):
            logits = logits + self.attn.position_logits(query)
        return logits.softmax(-1)


class VisionTransformer(nn.Module):
    """Images [B, C, H, W] in [-1, 1] to logits [B, num_classes].

    Args:
        image_shape: (C, H, W).
        patch: side P of a patch, or (height, width); with a stem, in positions of its feature map.
        width, depth, num_heads, mlp_dim: D, layers, heads, hidden size of the MLPs.
        classifier: "token" reads the class token, "gap" averages all patches (there is no class token then).
        representation_size: of the extra dense + tanh layer before the head ("pre_logits", in some pre-training
            heads only), or None.
        positions: "none", "learned_1d" (the paper's), "learned_2d" or "sin_cos", which are added to the tokens, or
            "relative", which is part of every attention.
        dropout: after the positions, the attention outputs and each dense layer of the MLPs.
        head_bias: initial bias of the head (-10 for sigmoid pre-training); its kernel starts at zero.
        stem_layers: units of each stage of a ResNet stem (hybrid models), or None.

    Raises:
        ValueError: an unknown option, or sizes that do not divide.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int],
        num_classes: int,
        patch: int | Sequence[int],
        width: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        classifier: str = "token",
        representation_size: int | None = None,
        positions: str = "learned_1d",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        head_bias: float = 0.0,
        stem_layers: Sequence[int] | None = None,
        stem_width_factor: float = 1.0,
    ) -> None:
        super().__init__()
        _check(width, num_heads, classifier, positions)
        channels, *size = image_shape
        patch_size = (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])
        self.stem = None if stem_layers is None else ResNetStem(channels, stem_layers, stem_width_factor)
        if self.stem is not None:
            channels, size = self.stem.out_channels, [-(-side // self.stem.reduction) for side in size]
        self.image_shape = tuple(image_shape)
        self.grid = _grid(size, patch_size)
        self.embedding = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, width)) if classifier == "token" else None
        self.positions = None
        if positions in POSITIONS:
            self.positions = POSITIONS[positions](self.grid, width, classifier == "token")
        self.dropout = nn.Dropout(dropout)
        tokens = self.grid[0] * self.grid[1] + (classifier == "token") if positions == "relative" else None
        self.blocks = nn.ModuleList(
            EncoderBlock(width, num_heads, mlp_dim, dropout, attention_dropout, tokens) for _ in range(depth)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.pre_logits = None if representation_size is None else nn.Linear(width, representation_size)
        self.head = nn.Linear(representation_size or width, num_classes)
        self._initialize(head_bias)

    def _initialize(self, head_bias: float) -> None:
        _initialize_dense(self.embedding)
        if self.pre_logits is not None:
            _initialize_dense(self.pre_logits)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, head_bias)

    @property
    def layers(self) -> list[EncoderBlock]:
        """The encoder's blocks, typed."""
        return [block for block in self.blocks if isinstance(block, EncoderBlock)]

    def embed(self, image: Tensor) -> Tensor:
        """Patch embeddings [B, N, D], row-major, before the class token and the positions.

        Raises:
            ValueError: the image has another shape than the model was built for.
        """
        if tuple(image.shape[1:]) != self.image_shape:
            raise ValueError(f"built for images of {self.image_shape}, got {tuple(image.shape[1:])}")
        if self.stem is not None:
            image = self.stem(image)
        return self.embedding(image).flatten(2).transpose(1, 2)

    def tokens(self, image: Tensor) -> Tensor:
        """z_0 of equation 1: [x_class; patches] + positions, [B, T, D]."""
        x_BTD = self.embed(image)
        if self.cls is not None:
            x_BTD = torch.cat([self.cls.expand(len(image), -1, -1), x_BTD], dim=1)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions()
        return self.dropout(x_BTD)

    def encode(self, image: Tensor) -> Tensor:
        """Tokens after the last block and the final LayerNorm, [B, T, D]."""
        x_BTD = self.tokens(image)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.encoder_norm(x_BTD)

    def pool(self, encoded: Tensor) -> Tensor:
        """The input of the head: class token (equation 4) or average, through `pre_logits` where there is one."""
        pooled = encoded.mean(1) if self.cls is None else encoded[:, 0]
        return pooled if self.pre_logits is None else self.pre_logits(pooled).tanh()

    def features(self, image: Tensor) -> Tensor:
        """Frozen-feature view of an image, [B, D or representation_size]."""
        return self.pool(self.encode(image))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))

    def attention_maps(self, image: Tensor) -> Tensor:
        """Attention weights of every layer and head, [depth, B, heads, T, T]."""
        x_BTD, maps = self.tokens(image), []
        for block in self.layers:
            maps.append(block.attention_weights(x_BTD))
            x_BTD = block(x_BTD)
        return torch.stack(maps)


def vision_transformer(
    variant: str | None = None,
    *,
    image_shape: Sequence[int],
    num_classes: int,
    patch: int | Sequence[int] | None = None,
    width: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_dim: int | None = None,
    classifier: str = "token",
    representation_size: int | None = None,
    positions: str = "learned_1d",
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    head_bias: float = 0.0,
    stem_layers: Sequence[int] | None = None,
    stem_width_factor: float = 1.0,
) -> VisionTransformer:
    """A model by name, by sizes, or by a name with some sizes replaced.

    Args:
        variant: "B/16" is ViT-B with 16x16 patches; also Ti, S, L, H with any patch, and "R50+B/16"; or None, and
            then every size is needed. The other arguments are those of `VisionTransformer`.

    Raises:
        ValueError: an unknown name, or a size that is missing.
    """
    sizes: dict[str, Any] = {} if variant is None else _named_sizes(variant)
    given = {
        "patch": patch,
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_dim": mlp_dim,
        "stem_layers": stem_layers,
    }
    sizes |= {name: value for name, value in given.items() if value is not None}
    missing = sorted(given.keys() - sizes.keys() - {"stem_layers"})
    if missing:
        raise ValueError(f"without a variant, {', '.join(missing)} must be given")
    return VisionTransformer(
        image_shape=image_shape,
        num_classes=num_classes,
        classifier=classifier,
        representation_size=representation_size,
        positions=positions,
        dropout=dropout,
        attention_dropout=attention_dropout,
        head_bias=head_bias,
        stem_width_factor=stem_width_factor,
        **sizes,
    )


def _named_sizes(variant: str) -> dict[str, Any]:
    match = re.fullmatch(r"(R\d+\+)?([A-Z][a-z]?)/(\d+)", variant)
    if match is None or match[2] not in SIZES or (match[1] and variant not in HYBRIDS):
        raise ValueError(f"unknown variant {variant!r}; sizes {', '.join(SIZES)} with /patch, or {', '.join(HYBRIDS)}")
    sizes = asdict(SIZES[match[2]]) | {"patch": int(match[3])}
    if variant in HYBRIDS:
        sizes["stem_layers"], sizes["patch"] = HYBRIDS[variant]
    return sizes


def _initialize_dense(layer: nn.Conv2d | nn.Linear) -> None:
    lecun_normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _check(width: int, num_heads: int, classifier: str, positions: str) -> None:
    if width % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the width {width}")
    if classifier not in CLASSIFIERS:
        raise ValueError(f"unknown classifier {classifier!r}; one of {', '.join(CLASSIFIERS)}")
    known = ("none", *POSITIONS, "relative")
    if positions not in known:
        raise ValueError(f"unknown positions {positions!r}; one of {', '.join(known)}")


def _grid(size: Sequence[int], patch: tuple[int, int]) -> tuple[int, int]:
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    if not rows or not columns:
        raise ValueError(f"patches of {patch} do not fit into {tuple(size)}")
    return rows, columns
