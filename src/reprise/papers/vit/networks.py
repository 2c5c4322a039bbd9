"""Which of the two compared networks a run trains."""

from __future__ import annotations

from collections.abc import Callable

from reprise.papers.vit.cnn import ConvNet
from reprise.papers.vit.model import VisionTransformer
from reprise.training.choices import chosen

Network = VisionTransformer | ConvNet


def build(network: str, vit: Callable[[], VisionTransformer], cnn: Callable[[], ConvNet]) -> Network:
    """The chosen network, "vit" or "cnn"; the other factory is not called.

    Raises:
        ValueError: another name.
    """
    factories: dict[str, Callable[[], Network]] = {"vit": vit, "cnn": cnn}
    return chosen(network, factories)
