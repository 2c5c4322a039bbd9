"""The rendered world: scenes of simple shapes with exact annotations, deterministic by seed and always there."""

from reprise.data.shapes.render import Rendered, render
from reprise.data.shapes.scenes import COLOURS, SHAPES, TEXTURES, SceneOptions, Scenes, draw_scenes

__all__ = ["COLOURS", "SHAPES", "TEXTURES", "Rendered", "SceneOptions", "Scenes", "draw_scenes", "render"]
