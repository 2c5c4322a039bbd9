"""What can be said about a scene: attributes, captions, and which classes are base or novel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reprise.data.shapes.scenes import SceneOptions, Scenes
from reprise.seeding import derive

RELATIONS = ("left of", "right of", "above", "below")
TEXTURE_WORDS = {"plain": "", "stripes": "striped", "dots": "dotted", "checks": "checked"}
TEMPLATES = ("{}", "a picture of {}", "there is {}", "an image with {}")


@dataclass(frozen=True)
class Attributes:
    """The words for one object; `size` is `small` or `large` (below or above the middle of the options' range)."""

    size: str
    colour: str
    texture: str
    shape: str

    def phrase(self) -> str:
        """E.g. `a small red striped star`."""
        words = [self.size, self.colour, TEXTURE_WORDS[self.texture], self.shape]
        return "a " + " ".join(word for word in words if word)


def attributes(options: SceneOptions, scenes: Scenes, item: int) -> list[Attributes]:
    """The attributes of the objects that are present in one scene, in slot order."""
    middle = 0.25 * options.image_size * (options.min_size + options.max_size)
    return [
        Attributes(
            size="large" if scenes.radius[item, slot] >= middle else "small",
            colour=options.colours[scenes.colour[item, slot]],
            texture=options.textures[scenes.texture[item, slot]],
            shape=options.shapes[scenes.shape[item, slot]],
        )
        for slot in np.flatnonzero(scenes.present[item])
    ]


def relation(scenes: Scenes, item: int, first: int, second: int) -> str:
    """Where slot `first` lies as seen from slot `second`, along the axis on which they are further apart."""
    x, y = scenes.centre[item, first] - scenes.centre[item, second]
    if abs(x) >= abs(y):
        return RELATIONS[0] if x < 0 else RELATIONS[1]
    return RELATIONS[2] if y < 0 else RELATIONS[3]


def caption(options: SceneOptions, scenes: Scenes, item: int, seed: int = 0) -> str:
    """One sentence: two objects and their relation where there are two, in a random template; pure in (seed, item)."""
    rng = np.random.default_rng(derive(seed, "caption", item))
    slots = rng.permutation(np.flatnonzero(scenes.present[item]))
    if not len(slots):
        return "an empty scene"
    phrases = dict(zip(np.flatnonzero(scenes.present[item]), attributes(options, scenes, item), strict=True))
    text = phrases[slots[0]].phrase()
    if len(slots) > 1:
        text += f" {relation(scenes, item, slots[0], slots[1])} {phrases[slots[1]].phrase()}"
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(text)


def captions(options: SceneOptions, scenes: Scenes, seed: int = 0) -> list[str]:
    """A caption for every scene."""
    return [caption(options, scenes, item, seed) for item in range(len(scenes))]


def base_novel_split(classes: Sequence[str], novel: int, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Base and novel class names (each in the given order), drawn by seed.

    Raises:
        ValueError: there would be no base or no novel class.
    """
    if not 0 < novel < len(classes):
        raise ValueError(f"{novel} novel classes out of {len(classes)}")
    chosen = set(np.random.default_rng(derive(seed, "novel")).permutation(len(classes))[:novel].tolist())
    base = tuple(name for position, name in enumerate(classes) if position not in chosen)
    return base, tuple(name for position, name in enumerate(classes) if position in chosen)
