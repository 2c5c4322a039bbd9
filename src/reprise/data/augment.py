"""Random augmentation of whole batches, with its own draw for EVERY sample.

torchvision's v2 transforms, called on a batch, draw once for all its samples; these draw `count` times and follow the
`Transform` protocol of `data/loader.py`: numbers are drawn for the whole global batch, each rank applies its own rows.
Images are float [B, C, H, W] (normalised or not: what fills in, and the colour space, are arguments).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from reprise.data.loader import Batch, Transform

Params = Mapping[str, Tensor]


class Compose:
    """Transforms one after the other; their parameters are kept apart by position."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {
            f"{position}.{name}": value
            for position, transform in enumerate(self.transforms)
            for name, value in transform.draw(count, rng).items()
        }

    def apply(self, batch: Batch, params: Params) -> Batch:
        for position, transform in enumerate(self.transforms):
            prefix = f"{position}."
            mine = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
            batch = transform.apply(batch, mine)
        return batch


def uniform(count: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    """`count` numbers in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=rng)


def _select(chosen: Tensor, changed: Tensor, image: Tensor) -> Tensor:
    """Each image [B, C, H, W] as it is, or changed where `chosen` (bool, broadcast over the image) says so.

    A linear interpolation by 0 or 1 gives exactly one of the two where both are finite, at a fifth of the time of
    `torch.where`, which goes through broadcast conditions value by value.
    """
    weight = chosen.to(image).reshape(chosen.shape + (1,) * (image.ndim - chosen.ndim))
    return torch.lerp(image, changed.to(image), weight)


def _per_channel(value: float | Sequence[float], image: Tensor) -> Tensor:
    """A number, or one for each channel, as [1, C, 1, 1] (or [1, 1, 1, 1])."""
    values = [value] if isinstance(value, (int, float)) else list(value)
    return torch.tensor(values, dtype=image.dtype, device=image.device).view(1, -1, 1, 1)


@dataclass
class RandomCrop:
    """Pad by `padding` on each side, then cut the original size at a random place (He et al. 2016, section 4.2).

    Args:
        padding: in pixels.
        fill: value of the padding, one number or one for each channel, in the space of the images.
    """

    padding: int
    fill: float | Sequence[float] = 0.0

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"offset": torch.randint(0, 2 * self.padding + 1, (count, 2), generator=rng)}

    def apply(self, batch: Batch, params: Params) -> Batch:
        return {**batch, "image": crop(batch["image"], params["offset"], self.padding, self.fill)}


def crop(image: Tensor, offset: Tensor, padding: int, fill: float | Sequence[float]) -> Tensor:
    """Windows of the original size at `offset` (int64 [B, 2]: top, left) of the padded images [B, C, H, W]."""
    count, channels, height, width = image.shape
    canvas = _per_channel(fill, image).expand(count, channels, 1, 1)
    canvas = canvas.repeat(1, 1, height + 2 * padding, width + 2 * padding)
    canvas[:, :, padding : padding + height, padding : padding + width] = image
    windows = canvas.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, 2p+1, 2p+1, H, W]
    top, left = offset.to(image.device).unbind(1)
    return windows[torch.arange(count, device=image.device), :, top, left]


@dataclass
class RandomHorizontalFlip:
    """Mirror left to right with probability p.

    In a detection batch the part that is not padding is mirrored in place, and with it the boxes (cxcywh, relative) and
    instance masks of the targets.
    """

    p: float = 0.5

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"flip": torch.rand(count, generator=rng) < self.p}

    def apply(self, batch: Batch, params: Params) -> Batch:
        flip = params["flip"]
        if "targets" not in batch:
            return {**batch, "image": _select(flip, batch["image"].flip(-1), batch["image"])}
        image = batch["image"].clone()
        targets = list(batch["targets"])
        semantic = batch["semantic"].clone() if "semantic" in batch else None
        for item in flip.nonzero().flatten().tolist():
            width = int(targets[item]["size"][1])
            image[item, :, :, :width] = image[item, :, :, :width].flip(-1)
            targets[item] = _flip_target(targets[item], width)
            if semantic is not None:
                semantic[item, :, :width] = semantic[item, :, :width].flip(-1)
        flipped = {**batch, "image": image, "targets": targets}
        return flipped if semantic is None else {**flipped, "semantic": semantic}


def _flip_target(target: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    boxes = target["boxes"].clone()
    boxes[:, 0] = 1 - boxes[:, 0]
    flipped = {**target, "boxes": boxes}
    if "masks" in target:
        masks = target["masks"].clone()
        masks[:, :, :width] = masks[:, :, :width].flip(-1)
        flipped["masks"] = masks
    return flipped


@dataclass
class RandomResizedCrop:
    """A random part of the image, stretched to `size` (Szegedy et al. 2015; torchvision's scale and ratio).

    Sampled bilinearly without anti-aliasing. Where the drawn shape does not fit, its sides are clipped to the image
    (torchvision tries ten times, then centre-crops).
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        area = uniform(count, *self.scale, rng)
        low, high = torch.tensor(self.ratio).log().tolist()
        aspect = uniform(count, low, high, rng).exp()
        place = torch.rand(count, 2, generator=rng)
        return {"area": area, "aspect": aspect, "place": place}

    def apply(self, batch: Batch, params: Params) -> Batch:
        image = batch["image"]
        height, width = image.shape[-2:]
        to = {"device": image.device, "dtype": image.dtype}
        area, aspect = params["area"].to(**to) * height * width, params["aspect"].to(**to)
        part_w = ((area * aspect).sqrt() / width).clamp(max=1)
        part_h = ((area / aspect).sqrt() / height).clamp(max=1)
        centre = params["place"].to(**to) * 2 - 1  # in [-1, 1], scaled by the room that is left
        theta = torch.zeros(len(image), 2, 3, **to)
        theta[:, 0, 0], theta[:, 1, 1] = part_w, part_h
        theta[:, 0, 2], theta[:, 1, 2] = centre[:, 0] * (1 - part_w), centre[:, 1] * (1 - part_h)
        grid = F.affine_grid(theta, [len(image), image.shape[1], *self.size], align_corners=False)
        return {**batch, "image": F.grid_sample(image, grid, padding_mode="border", align_corners=False)}


@dataclass
class ColorJitter:
    """Brightness, contrast, saturation and hue, in this order (torchvision shuffles the order), with probability p.

    Factors as in torchvision: brightness b draws from [max(0, 1-b), 1+b], hue h from [-h, h] (in turns of the circle).

    Args:
        mean, std: the normalisation of the images, undone before and redone after; colours are clipped to [0, 1].
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        amounts = {"brightness": self.brightness, "contrast": self.contrast, "saturation": self.saturation}
        params = {name: uniform(count, max(0.0, 1 - amount), 1 + amount, rng) for name, amount in amounts.items()}
        params["hue"] = uniform(count, -self.hue, self.hue, rng)
        params["chosen"] = torch.rand(count, generator=rng) < self.p
        return params

    def apply(self, batch: Batch, params: Params) -> Batch:
        image = batch["image"]
        mean, std = _per_channel(self.mean, image), _per_channel(self.std, image)
        colour = image * std + mean
        factor = {name: value.to(image)[:, None, None, None] for name, value in params.items() if name != "chosen"}
        colour = (colour * factor["brightness"]).clamp(0, 1)
        average = grey(colour).mean((-2, -1), keepdim=True)
        colour = (average + factor["contrast"] * (colour - average)).clamp(0, 1)
        if image.shape[1] == 3:
            luma = grey(colour)
            colour = (luma + factor["saturation"] * (colour - luma)).clamp(0, 1)
            colour = shift_hue(colour, factor["hue"]) if self.hue else colour
        return {**batch, "image": _select(params["chosen"], (colour - mean) / std, image)}


def grey(image: Tensor) -> Tensor:
    """Luma (ITU-R 601) of RGB images, [B, 1, H, W]; images with another number of channels are averaged."""
    if image.shape[1] != 3:
        return image.mean(1, keepdim=True)
    weight = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype, device=image.device)
    return (image * weight.view(1, 3, 1, 1)).sum(1, keepdim=True)


def shift_hue(image: Tensor, turn: Tensor) -> Tensor:
    """RGB images in [0, 1] with the HSV hue turned by `turn` (fractions of the circle, [B, 1, 1, 1])."""
    value, largest = image.max(1, keepdim=True)
    chroma = value - image.min(1, keepdim=True).values
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    red, green, blue = image.split(1, 1)
    sector = torch.cat([(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe], 1).gather(1, largest)
    base = torch.tensor([5.0, 3.0, 1.0], dtype=image.dtype, device=image.device).view(1, 3, 1, 1)
    position = (base + sector + 6 * turn) % 6
    return value - chroma * torch.minimum(position, 4 - position).clamp(0, 1)


@dataclass
class RandomGrayscale:
    """Replace colours by their luma with probability p; `mean` and `std` as in `ColorJitter`."""

    p: float = 0.2
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": torch.rand(count, generator=rng) < self.p}

    def apply(self, batch: Batch, params: Params) -> Batch:
        image = batch["image"]
        mean, std = _per_channel(self.mean, image), _per_channel(self.std, image)
        changed = (grey(image * std + mean).expand_as(image) - mean) / std
        return {**batch, "image": _select(params["chosen"], changed, image)}


@dataclass
class GaussianBlur:
    """Blur with a standard deviation drawn from `sigma` (pixels), with probability p; borders are reflected."""

    kernel_size: int = 3
    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5

    def __post_init__(self) -> None:
        if self.kernel_size % 2 != 1:
            raise ValueError(f"the kernel size must be odd, not {self.kernel_size}")

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"sigma": uniform(count, *self.sigma, rng), "chosen": torch.rand(count, generator=rng) < self.p}

    def apply(self, batch: Batch, params: Params) -> Batch:
        image = batch["image"]
        radius = self.kernel_size // 2
        offset = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
        weight = torch.exp(-0.5 * (offset / params["sigma"].to(image)[:, None]) ** 2)
        weight = (weight / weight.sum(1, keepdim=True))[:, :, None, None, None]
        padded = F.pad(image, [radius] * 4, mode="reflect")
        height, width = image.shape[-2:]
        rows = torch.stack([weight[:, k] * padded[:, :, k : k + height] for k in range(self.kernel_size)]).sum(0)
        blurred = torch.stack([weight[:, k] * rows[..., k : k + width] for k in range(self.kernel_size)]).sum(0)
        return {**batch, "image": _select(params["chosen"], blurred, image)}


@dataclass
class Cutout:
    """Blank a square of `size` pixels around a random centre, cut off at the border (DeVries and Taylor 2017)."""

    size: int
    fill: float | Sequence[float] = 0.0
    p: float = 1.0

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"centre": torch.rand(count, 2, generator=rng), "chosen": torch.rand(count, generator=rng) < self.p}

    def apply(self, batch: Batch, params: Params) -> Batch:
        image = batch["image"]
        extent = torch.tensor(image.shape[-2:])
        start = (params["centre"] * extent).long() - self.size // 2
        inside = box_mask(torch.cat([start, start + self.size], 1), *image.shape[-2:])
        hidden = (inside & params["chosen"][:, None, None]).to(image.device)[:, None]
        return {**batch, "image": _select(hidden, _per_channel(self.fill, image), image)}


def box_mask(box: Tensor, height: int, width: int) -> Tensor:
    """bool [B, H, W], true inside integer boxes [B, 4] (top, left, bottom, right; the last two exclusive)."""
    top, left, bottom, right = box[:, :, None].unbind(1)
    row, column = torch.arange(height), torch.arange(width)
    return ((row >= top) & (row < bottom))[:, :, None] & ((column >= left) & (column < right))[:, None, :]


def mixup(image: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    """weight * image + (1 - weight) * partner (Zhang et al. 2018, section 2); weight [B]."""
    weight = weight.to(image)[:, None, None, None]
    return weight * image + (1 - weight) * partner


def cutmix(image: Tensor, partner: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """The images with the partners' pixels inside integer boxes [B, 4] (Yun et al. 2019, section 3.1).

    Returns:
        The mixed images, and the weight of the own label: the share of pixels kept, float [B].
    """
    inside = box_mask(box, *image.shape[-2:])
    kept = 1 - inside.float().mean((1, 2))
    return _select(inside[:, None], partner, image), kept.to(image)


def beta(count: int, alpha: float, rng: torch.Generator) -> Tensor:
    """`count` draws from Beta(alpha, alpha), float32."""
    import numpy as np

    seed = int(torch.randint(2**62, (1,), generator=rng))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count)).float()


@dataclass
class Mix:
    """Mixup and CutMix with a weight for every sample.

    Each item is mixed with the one at the mirrored position of THIS RANK's part of the batch (last with first): pairs
    depend on the number of ranks. Adds `mix_label` (the partner's label) and `mix_weight` float [B] (the weight of the
    own label): loss = mix_weight * L(label) + (1 - mix_weight) * L(mix_label).

    Args:
        mixup_alpha, cutmix_alpha: Beta(alpha, alpha) of each; None leaves it out. With both, a fair coin chooses.
    """

    mixup_alpha: float | None = 0.2
    cutmix_alpha: float | None = None
    _kinds: list[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = (("mixup", self.mixup_alpha), ("cutmix", self.cutmix_alpha))
        self._kinds = [kind for kind, alpha in pairs if alpha is not None]
        if not self._kinds:
            raise ValueError("at least one of mixup_alpha and cutmix_alpha must be given")

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        ones = torch.ones(count)
        params = {
            "mixup": ones if self.mixup_alpha is None else beta(count, self.mixup_alpha, rng),
            "cutmix": ones if self.cutmix_alpha is None else beta(count, self.cutmix_alpha, rng),
            "centre": torch.rand(count, 2, generator=rng),
        }
        coin = torch.rand(count, generator=rng) < 0.5
        params["cut"] = coin if len(self._kinds) == 2 else torch.full((count,), self._kinds == ["cutmix"])
        return params

    def apply(self, batch: Batch, params: Params) -> Batch:
        image, partner = batch["image"], batch["image"].flip(0)
        cut = params["cut"].to(image.device)
        box = cutmix_box(params["cutmix"], params["centre"], *image.shape[-2:])
        pasted, kept = cutmix(image, partner, box)
        blended = mixup(image, partner, params["mixup"])
        weight = torch.where(cut, kept, params["mixup"].to(image))
        mixed = _select(cut, pasted, blended)
        return {**batch, "image": mixed, "mix_label": batch["label"].flip(0), "mix_weight": weight}


def cutmix_box(weight: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """Boxes [B, 4] whose sides are sqrt(1 - weight) of the image's, clipped at its border (Yun et al. 2019, eq. 2)."""
    side = (1 - weight).clamp(min=0).sqrt()[:, None] * torch.tensor([height, width])
    middle = centre * torch.tensor([height, width])
    limit = torch.tensor([height, width])
    start, stop = (middle - side / 2).round().long(), (middle + side / 2).round().long()
    return torch.cat([start.clamp(min=0), torch.minimum(stop, limit)], 1)
