"""Student and teacher: a DINO-style Vision Transformer with a projection head for class and patch tokens.

Shapes: B images, N patches, D width, K prototypes, H heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from reprise.errors import ConfigError
from reprise.nn.ema import momentum_copy, update_momentum

LAYER_NORM_EPS = 1e-6
INIT_STD = 0.02
POSITION_OFFSET = 0.1  # DINO adds it to the target grid before dividing, against rounding down
VARIANTS = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}  # width, depth, heads


class PatchEmbedding(nn.Module):
    """Images [B, C, h, w] to non-overlapping patches [B, N, D], row by row."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The backbone; parameter names are those of the official checkpoints.

    Args:
        image_size: side of the images that the learned positions belong to.
        patch: side of a patch.
        drop_path: largest rate of stochastic depth; it grows linearly over the blocks.
        init_std: of dense layers, positions and the class token; 0.02 suits widths of hundreds.

    Raises:
        ConfigError: the image is not a whole number of patches, or the width of heads.
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        *,
        channels: int = 3,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        init_std: float = INIT_STD,
    ) -> None:
        super().__init__()
        if image_size % patch or width % num_heads:
            raise ConfigError(
                f"{image_size} pixels in patches of {patch}, width {width} in {num_heads} heads: not whole numbers",
                looked_at="paper.model",
            )
        self.width, self.patch, self.grid = width, patch, image_size // patch
        self.patch_embed = PatchEmbedding(channels, patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2 + 1, width))
        self.masked_embed = nn.Parameter(torch.zeros(1, width))
        norm: Any = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)  # timm asks for a class
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates
        )
        self.norm = norm(width)
        self.apply(partial(_init_dense, std=init_std))
        nn.init.trunc_normal_(self.pos_embed, std=init_std)
        nn.init.trunc_normal_(self.cls_token, std=init_std)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens after the final norm, [B, 1 + N, D], the class token first.

        Args:
            image: [B, C, h, w], of any size that is a whole number of patches.
            mask: bool [B, h/P, w/P]; true patches are replaced by the mask embedding before positions are added.
        """
        x = self._embed(image, mask)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def with_attention(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens as from `forward`, and the last block's attention probabilities [B, H, 1 + N, 1 + N]."""
        x = self._embed(image, mask)
        for block in self.blocks[:-1]:
            x = block(x)
        x, attention = block_with_attention(self.blocks[-1], x)
        return self.norm(x), attention

    def _embed(self, image: Tensor, mask: Tensor | None) -> Tensor:
        x = self.patch_embed(image)
        if mask is not None:
            x = torch.where(mask.flatten(1)[..., None], self.masked_embed.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + self.positions(*image.shape[-2:])

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings [1, 1 + N, D] for images of `height` x `width` pixels.

        Other sizes than the learned one are sampled bicubically with DINO's scale factor (grid + 0.1) / learned grid,
        which, not the ratio of the sizes, sets the sampling points.
        """
        rows, columns = height // self.patch, width // self.patch
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        learned = self.pos_embed[0, 1:].unflatten(0, (self.grid, self.grid))
        down, across = (
            bicubic_weights(self.grid, (size + POSITION_OFFSET) / self.grid, learned.device) for size in (rows, columns)
        )
        resized = (down[:, :, None, None] * learned).sum(1)  # products and sums, which autocast leaves in float32
        resized = (across[:, :, None] * resized[:, None]).sum(2)
        return torch.cat([self.pos_embed[:, :1], resized.flatten(0, 1)[None]], 1)


def bicubic_weights(size: int, scale: float, device: torch.device) -> Tensor:
    """How much each of `size` places counts in each place after bicubic scaling of a row, [int(size * scale), size].

    Bicubic scaling of an image is this down its columns and then along its rows; written as products and sums its
    gradient is added up in a fixed order on every device, which CUDA's interpolation cannot do.
    """
    one_hot = torch.eye(size, device=device)[:, None, :, None]
    return F.interpolate(one_hot, scale_factor=[scale, 1.0], mode="bicubic")[:, 0, :, 0].T


def block_with_attention(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A pre-norm block's output [B, T, D] for x [B, T, D], the same bits as `block(x)`, and its attention [B, H, T, T].

    The output comes from the fused kernel, as in `block(x)`; that kernel keeps the probabilities to itself, so queries
    and keys, which are shared, are multiplied once more for them.
    """
    assert isinstance(block, Block)
    attention = block.attn
    assert isinstance(attention, Attention)
    parts = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind(0)
    probability = (query @ key.transpose(-2, -1) * attention.scale).softmax(-1)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    x = x + block.drop_path1(block.ls1(attention.proj(mixed)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), probability


def patch_weights(attention: Tensor) -> Tensor:
    """The class token's attention to the patches, averaged over heads and renormalised to sum 1: [B, N]."""
    weight = attention[:, :, 0, 1:].mean(1)
    return weight / weight.sum(-1, keepdim=True)


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are weight_g * weight_v / |weight_v|; g starts at 1.

    Args:
        train_norm: whether weight_g is learned.
    """

    def __init__(self, in_features: int, out_features: int, *, train_norm: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)  # nn.Linear's own

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class ProjectionHead(nn.Module):
    """MLP with GELU, L2 normalisation, then weight-normalised prototypes for class and patch tokens.

    Args:
        layers: of the MLP: in - hidden - ... - bottleneck.
        patch_prototypes: of the patch tokens; used only where they have a layer of their own.
        shared: class and patch tokens share their prototypes.
        train_prototype_norm: whether the norms of the prototypes are learned.
        init_std: of the MLP.
    """

    def __init__(
        self,
        in_features: int,
        *,
        prototypes: int = 8192,
        patch_prototypes: int | None = None,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        shared: bool = True,
        train_prototype_norm: bool = True,
        init_std: float = INIT_STD,
    ) -> None:
        super().__init__()
        self.shared = shared
        sizes = [in_features, *[hidden] * (layers - 1), bottleneck]
        modules: list[nn.Module] = []
        for position in range(layers):
            modules += [nn.Linear(sizes[position], sizes[position + 1]), nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        self.apply(partial(_init_dense, std=init_std))
        self.last_layer = WeightNormLinear(bottleneck, prototypes, train_norm=train_prototype_norm)
        own = patch_prototypes or prototypes
        self.last_layer2 = (
            self.last_layer if shared else WeightNormLinear(bottleneck, own, train_norm=train_prototype_norm)
        )

    def forward(self, cls: Tensor) -> Tensor:
        """Logits [..., K] of class tokens [..., D]."""
        return self.last_layer(F.normalize(self.mlp(cls), dim=-1))

    def patches(self, patch: Tensor) -> Tensor:
        """Logits [..., K] of patch tokens [..., D]."""
        return self.last_layer2(F.normalize(self.mlp(patch), dim=-1))


class Projected(NamedTuple):
    """What a network makes of a batch of views.

    Attributes:
        tokens: [B, 1 + N, D] after the final norm.
        cls: logits [B, K] of the class tokens.
        patch: logits [B, N, K] of the patch tokens, or None where they were not asked for.
    """

    tokens: Tensor
    cls: Tensor
    patch: Tensor | None


class DistillationNetwork(nn.Module):
    """Backbone and head of a student or a teacher."""

    def __init__(self, backbone: VisionTransformer, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, image: Tensor, mask: Tensor | None = None, *, patches: bool = True) -> Projected:
        """Tokens and logits of views [B, C, h, w], masked where `mask` [B, h/P, w/P] is true."""
        return self.project(self.backbone(image, mask), patches=patches)

    def project(self, tokens: Tensor, *, patches: bool = True) -> Projected:
        """Logits of tokens [B, 1 + N, D]."""
        return Projected(tokens, self.head(tokens[:, 0]), self.head.patches(tokens[:, 1:]) if patches else None)


def network(
    image_size: int,
    patch: int,
    *,
    channels: int = 3,
    variant: str = "small",
    width: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    prototypes: int = 8192,
    hidden: int = 2048,
    bottleneck: int = 256,
    shared_head: bool = True,
    train_prototype_norm: bool = True,
    init_std: float = INIT_STD,
) -> DistillationNetwork:
    """A student of a published size (`variant` tiny, small or base); widths and depths given replace the variant's.

    Raises:
        ConfigError: an unknown variant, or sizes that do not divide.
    """
    if variant not in VARIANTS:
        raise ConfigError(
            f"unknown variant {variant!r}", looked_at="paper.model.variant", next_step=f"one of {', '.join(VARIANTS)}"
        )
    own = VARIANTS[variant]
    backbone = VisionTransformer(
        image_size,
        patch,
        channels=channels,
        width=width or own[0],
        depth=depth or own[1],
        num_heads=num_heads or own[2],
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        init_std=init_std,
    )
    head = ProjectionHead(
        backbone.width,
        prototypes=prototypes,
        hidden=hidden,
        bottleneck=bottleneck,
        shared=shared_head,
        train_prototype_norm=train_prototype_norm,
        init_std=init_std,
    )
    return DistillationNetwork(backbone, head)


def make_teacher(student: DistillationNetwork) -> DistillationNetwork:
    """A copy without gradients and without stochastic depth. It never masks, so its mask embedding is idle."""
    teacher = momentum_copy(student)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return teacher


def follow(teacher: DistillationNetwork, student: DistillationNetwork, momentum: float) -> None:
    """theta_t <- m theta_t + (1 - m) theta_s. Where only one of the two shares its head, last_layer2 stays as it is."""
    update_momentum(teacher.backbone, student.backbone, momentum)
    update_momentum(teacher.head.mlp, student.head.mlp, momentum)
    update_momentum(teacher.head.last_layer, student.head.last_layer, momentum)
    if not (teacher.head.shared or student.head.shared):
        update_momentum(teacher.head.last_layer2, student.head.last_layer2, momentum)


def pooled_features(
    tokens: Tensor, attention: Tensor, *, cls: bool = True, average: bool = False, weighted: bool = True
) -> Tensor:
    """Features for few-shot evaluation: the chosen parts, each L2-normalised, side by side [B, parts * D].

    Args:
        tokens: [B, 1 + N, D]; attention: [B, H, 1 + N, 1 + N] of the last block.
        cls: the class token; average: the mean of the patches; weighted: their mean weighted by `patch_weights`.

    Raises:
        ValueError: no part is chosen.
    """
    patch = tokens[:, 1:]
    parts = [tokens[:, 0]] if cls else []
    parts += [patch.mean(1)] if average else []
    parts += [torch.einsum("bn,bnd->bd", patch_weights(attention), patch)] if weighted else []
    if not parts:
        raise ValueError("features need at least one of cls, average and weighted")
    return torch.cat([F.normalize(part, dim=-1) for part in parts], -1)


def _init_dense(module: nn.Module, std: float) -> None:
    """Dense layers from a normal distribution cut off at two (not at two deviations), biases zero, as in DINO."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
