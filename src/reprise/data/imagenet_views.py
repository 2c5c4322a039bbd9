"""ImageNet with several random views of each training image, made item by item in the loader's workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reprise.data.folder import Sample
from reprise.data.imagenet import ImageFolderItems, ImageNet, read_image
from reprise.data.views import ViewOptions, view_options


def pillow_blur(image: Tensor, sigma: float) -> Tensor:
    """8-bit RGB [3, H, W] blurred by Pillow, whose Gaussian is three box blurs: what the released pipelines use."""
    from PIL import Image, ImageFilter

    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    blurred = picture.filter(ImageFilter.GaussianBlur(radius=sigma))
    return torch.frombuffer(bytearray(blurred.tobytes()), dtype=torch.uint8).view(*image.shape[1:], 3).permute(2, 0, 1)


def random_view(image: Tensor, options: ViewOptions) -> Tensor:
    """One view of an 8-bit image [3, H, W], 8-bit [3, size, size], with torch's global generator.

    The released input pipeline: anti-aliased crop, jitter in random order, Pillow's blur.
    """
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as tvf

    def happens(probability: float) -> bool:
        return probability > 0 and float(torch.rand(())) < probability

    image = v2.RandomResizedCrop([options.size, options.size], scale=options.scale, antialias=True)(image)
    if options.grayscale_first and happens(options.grayscale_p):
        image = tvf.rgb_to_grayscale(image, 3)
    if happens(options.jitter_p):
        image = v2.ColorJitter(*options.jitter)(image)
    if not options.grayscale_first and happens(options.grayscale_p):
        image = tvf.rgb_to_grayscale(image, 3)
    if happens(options.blur_p):
        low, high = options.blur_sigma
        image = pillow_blur(image, low + (high - low) * float(torch.rand(())))
    if happens(options.solarize_p):
        image = tvf.solarize(image, 128.0)
    return tvf.horizontal_flip(image) if happens(options.flip_p) else image


@dataclass
class ViewItems(ImageFolderItems):
    """`ImageFolderItems` whose training samples have one entry for each view (and no `image`)."""

    views: Mapping[str, ViewOptions]

    def item(self, index: int, augment: bool) -> Sample:
        if not augment:
            return super().item(index, augment)
        path, label = self.files[index]
        image = read_image(Path(path))
        made = {name: self.normalisation.apply(random_view(image, options)) for name, options in self.views.items()}
        return {"label": label, **made}


class ImageNetViews(ImageNet):
    """`ImageNet` whose training batches hold random views.

    Args:
        views: name -> options of `ViewOptions`; `crop_scale` and `flip` are not used.
    """

    def __init__(self, *, views: Mapping[str, Mapping[str, Any]], **common: Any) -> None:
        super().__init__(**common)
        self.views = view_options(views)

    def _items(self, part: str) -> ViewItems:
        plain = super()._items(part)
        return ViewItems(
            plain.folder,
            plain.classes,
            plain.image_size,
            plain.resize,
            plain.crop_scale,
            plain.flip,
            plain.normalisation,
            self.views,
        )
