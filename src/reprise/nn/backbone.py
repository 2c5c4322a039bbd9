"""Convolutional feature extractors for detectors: torchvision's residual blocks, and a small stem for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

from reprise.errors import CheckpointError

Norm = Callable[[int], nn.Module]
RESNETS: dict[str, tuple[Literal["basic", "bottleneck"], tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
}


class ResNetBody(nn.Module):
    """The layers of a ResNet without pooling and classifier, parameter names as in torchvision.

    Args:
        block: `basic` or `bottleneck` blocks.
        layers: blocks of each of the four stages.
        width: channels of the stem and planes of the first stage.
        dilation: the last stage keeps its resolution and dilates its 3x3 convolutions instead (DC5; bottleneck only).
        norm: channels to a normalisation layer.
    """

    def __init__(
        self,
        block: Literal["basic", "bottleneck"],
        layers: Sequence[int],
        *,
        width: int = 64,
        dilation: bool = False,
        norm: Norm = FrozenBatchNorm2d,
    ) -> None:
        super().__init__()
        self._block = BasicBlock if block == "basic" else Bottleneck
        self._norm = norm
        self._inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(width, layers[0], stride=1)
        self.layer2 = self._stage(width * 2, layers[1], stride=2)
        self.layer3 = self._stage(width * 4, layers[2], stride=2)
        self.layer4 = self._stage(width * 8, layers[3], stride=2, dilated=dilation)
        self.channels = tuple(width * factor * self._block.expansion for factor in (1, 2, 4, 8))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, planes: int, count: int, *, stride: int, dilated: bool = False) -> nn.Sequential:
        """Blocks of one stage; in a dilated one the stride becomes the dilation of the blocks after the first."""
        dilation = stride if dilated else 1
        stride = 1 if dilated else stride
        outplanes = planes * self._block.expansion
        downsample = None
        if stride != 1 or self._inplanes != outplanes:
            projection = nn.Conv2d(self._inplanes, outplanes, 1, stride=stride, bias=False)
            downsample = nn.Sequential(projection, self._norm(outplanes))
        blocks = [self._block(self._inplanes, planes, stride, downsample, norm_layer=self._norm)]
        self._inplanes = outplanes
        blocks += [self._block(outplanes, planes, dilation=dilation, norm_layer=self._norm) for _ in range(1, count)]
        return nn.Sequential(*blocks)

    def stages(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to the stages at strides 4, 8, 16 and 32 (16 with dilation)."""
        hidden = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = stage(hidden)
            found.append(hidden)
        return found


class ResNetBackbone(nn.Module):
    """A ResNet with frozen batch norm whose stem and first stage never train, for fine-tuning from ImageNet.

    Frozen statistics are only right with pretrained weights: train a backbone from scratch with another norm
    (`ConvStem`).

    Args:
        name: `resnet18`, `resnet34`, `resnet50`, `resnet101`, or None to give `block`, `layers` and `width`.
        dilation: DC5, the last stage at stride 16.
        train_backbone: whether stages 2 to 4 train.
        block, layers, width: of a ResNet of another size.
    """

    def __init__(
        self,
        name: str | None = "resnet50",
        *,
        dilation: bool = False,
        train_backbone: bool = True,
        block: Literal["basic", "bottleneck"] = "bottleneck",
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
    ) -> None:
        super().__init__()
        if name is not None:
            if name not in RESNETS:
                raise ValueError(f"unknown backbone {name!r}; known: {', '.join(RESNETS)}")
            block, layers = RESNETS[name]
        self.name = name
        self.body = ResNetBody(block, layers, width=width, dilation=dilation)
        self.channels = self.body.channels
        trained = ("layer2", "layer3", "layer4") if train_backbone else ()
        for key, parameter in self.body.named_parameters():
            parameter.requires_grad_(key.startswith(trained))

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to the features of the four stages, [B, channels[i], H_i, W_i]."""
        return self.body.stages(image)


class ConvStem(nn.Module):
    """Stride-2 convolution, group norm, ReLU, a few times: features of small images without pretraining.

    Args:
        widths: output channels of each block; the stride is 2 ** len(widths).
        groups: groups of every norm.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 64), *, groups: int = 8) -> None:
        super().__init__()
        inputs = (3, *widths[:-1])
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.GroupNorm(groups, after), nn.ReLU()
            )
            for before, after in zip(inputs, widths, strict=True)
        )
        self.channels = tuple(widths)

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to the features of every block."""
        stages = []
        for block in self.body:
            image = block(image)
            stages.append(image)
        return stages


Backbone = ResNetBackbone | ConvStem


def build_backbone(name: str, *, dilation: bool, train_backbone: bool, stem_widths: Sequence[int]) -> Backbone:
    """A backbone from plain options.

    Args:
        name: `resnet18` .. `resnet101` (with `dilation` and `train_backbone`), or `conv_stem` (with `stem_widths`).

    Raises:
        ValueError: an unknown name, or a dilated conv_stem.
    """
    if name != "conv_stem":
        return ResNetBackbone(name, dilation=dilation, train_backbone=train_backbone)
    if dilation:
        raise ValueError("the conv_stem backbone has no dilation")
    return ConvStem(stem_widths)


def load_imagenet(backbone: nn.Module, version: str = "IMAGENET1K_V1") -> None:
    """Load torchvision's ImageNet weights of a `ResNetBackbone` (downloaded once, checksum verified).

    Raises:
        CheckpointError: when there are no such weights or they cannot be fetched.
    """
    from torchvision.models import get_weight

    try:
        if not isinstance(backbone, ResNetBackbone):
            raise ValueError(f"{type(backbone).__name__} is no network of torchvision's")
        family = (backbone.name or "").replace("resnet", "ResNet")
        weights = get_weight(f"{family}_Weights.{version}")
        state = dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"no ImageNet weights {version} for the backbone: {error}",
            looked_at="torchvision's weights and torch's hub cache (TORCH_HOME)",
            next_step="put the file into $TORCH_HOME/hub/checkpoints, or set paper.backbone_weights=null",
        ) from error
    backbone.body.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
