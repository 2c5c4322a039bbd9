"""What a data module says about itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataSpec:
    """Facts about a data set as a recipe uses it.

    Attributes:
        name: the registry name.
        image_shape: (channels, height, width) of one item, or None where items are not images.
        classes: class names, in label order.
        sizes: number of items of each split.
        licence, source: where it came from and under which terms.
    """

    name: str
    image_shape: tuple[int, int, int] | None
    classes: tuple[str, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    licence: str = ""
    source: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.classes)
