"""The rendered world: determinism, exact annotations, options, motion, words, data modules."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import yaml

from reprise import paths
from reprise.data.shapes import SHAPES, TEXTURES, SceneOptions, Scenes, draw_scenes, render
from reprise.data.shapes.dataset import ShapesClassification, ShapesDetection
from reprise.data.shapes.language import attributes, base_novel_split, captions, relation
from reprise.data.shapes.motion import at_frame, render_video
from reprise.data.shapes.outlines import OUTLINES
from reprise.data.shapes.render import semantic
from reprise.errors import ConfigError

EVERYTHING = SceneOptions(
    shapes=SHAPES, textures=TEXTURES, clutter=3, background="mottled", max_overlap=0.5, truncation=0.2, max_objects=6
)


def one_object(**fields: object) -> Scenes:
    """A scene with one plain red object of radius 12 in the middle of 64x64 pixels."""
    scenes = draw_scenes(SceneOptions(max_objects=1), 1, 0)
    given = {"shape": 0, "texture": 0, "radius": 12.0, "centre": [32.0, 32.0], "angle": 0.0, **fields}
    arrays = {
        name: np.broadcast_to(value, getattr(scenes, name).shape).astype(getattr(scenes, name).dtype)
        for name, value in given.items()
    }
    return dataclasses.replace(scenes, present=np.ones((1, 1), bool), **arrays)


def test_equal_seeds_give_equal_pixels_and_a_set_begins_with_the_smaller_set():
    small, large = draw_scenes(EVERYTHING, 30, 1, "train"), draw_scenes(EVERYTHING, 700, 1, "train")
    assert all(np.array_equal(value, large.tables()[name][:30]) for name, value in small.tables().items())
    first, again = render(EVERYTHING, small), render(EVERYTHING, large[:30])
    assert all(np.array_equal(value, again.tables()[name]) for name, value in first.tables().items())
    assert not np.array_equal(first.image, render(EVERYTHING, draw_scenes(EVERYTHING, 30, 1, "test")).image)


def test_boxes_and_areas_are_those_of_the_masks():
    scenes = draw_scenes(EVERYTHING, 40, 3)
    rendered = render(EVERYTHING, scenes)
    for item in range(40):
        for slot, mask in enumerate(rendered.masks(item)):
            rows, columns = np.nonzero(mask)
            assert rendered.area_visible[item, slot] == len(rows)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
            assert rendered.boxes_visible[item, slot].tolist() == box
            assert not mask.any() or scenes.present[item, slot]
    assert (rendered.area_visible <= rendered.area_full).all()
    assert (rendered.coco_boxes()[..., 2:] == rendered.boxes_visible[..., 2:] - rendered.boxes_visible[..., :2]).all()


def test_full_boxes_are_those_of_the_object_alone():
    scenes = draw_scenes(EVERYTHING, 20, 4)
    together = render(EVERYTHING, scenes)
    for slot in range(EVERYTHING.max_objects):
        only = scenes.present & (np.arange(EVERYTHING.max_objects) == slot)
        alone = render(EVERYTHING, dataclasses.replace(scenes, present=only))
        assert np.array_equal(alone.boxes_visible[:, slot], together.boxes_full[:, slot])
        assert np.array_equal(alone.area_visible[:, slot], together.area_full[:, slot])


def test_a_later_slot_hides_an_earlier_one():
    options = SceneOptions(max_objects=2)
    scenes = draw_scenes(options, 1, 0)
    scenes = dataclasses.replace(
        scenes, present=np.ones((1, 2), bool), shape=np.zeros((1, 2), int), radius=np.full((1, 2), 10, np.float32),
        centre=np.array([[[30, 30], [36, 30]]], np.float32),
    )  # fmt: skip
    rendered = render(options, scenes)
    assert rendered.instances[0, 30, 33] == 2
    assert rendered.area_visible[0, 1] == rendered.area_full[0, 1] == pytest.approx(np.pi * 100, rel=0.02)
    assert rendered.area_visible[0, 0] < rendered.area_full[0, 0]
    assert rendered.boxes_full[0].tolist() == [[20, 20, 40, 40], [26, 20, 46, 40]]
    assert rendered.boxes_visible[0].tolist() == [[20, 20, 33, 40], [26, 20, 46, 40]]
    assert semantic(rendered, scenes)[0, 30, 33] == scenes.shape[0, 1] + 1


@pytest.mark.parametrize("name", SHAPES)
def test_outlines_reach_the_unit_circle_and_have_unit_slope_at_the_edge(name: str):
    v, u = np.meshgrid(np.linspace(-1.3, 1.3, 521), np.linspace(-1.3, 1.3, 521), indexing="ij")
    distance = OUTLINES[name](u, v)
    reach = np.hypot(u, v)[distance <= 0].max()
    assert 0.93 < reach < 1.02
    across, along = np.gradient(distance, 2.6 / 520)
    slope = np.hypot(across, along)[np.abs(distance) < 0.01]
    assert np.median(slope) == pytest.approx(1, abs=0.03)


def test_edges_are_anti_aliased():
    options = SceneOptions(max_objects=1, noise=0.0)
    image = render(options, one_object(tint=[1.0, 1.0, 1.0], ground=0.0)).image[0, 0]
    assert image[32, 32] == 255
    assert image[0, 0] == 0
    assert ((image > 0) & (image < 255)).sum() > 30
    assert image.astype(float).sum() / 255 == pytest.approx(np.pi * 144, rel=0.01)


def test_textures_colour_jitter_clutter_and_noise_change_pixels():
    plain = SceneOptions(max_objects=1, noise=0.0)
    looks = {
        render(SceneOptions(max_objects=1, noise=0.0, textures=TEXTURES), one_object(texture=k)).image.tobytes()
        for k in range(4)
    }
    assert len(looks) == 4
    clean = render(plain, one_object()).image.astype(int)
    noisy = render(SceneOptions(max_objects=1, noise=0.1), one_object()).image.astype(int)
    assert (noisy - clean)[0].std() == pytest.approx(25.5, rel=0.2)
    cluttered = SceneOptions(clutter=8)
    bare = dataclasses.replace(draw_scenes(cluttered, 3, 0), strokes=np.zeros((3, 0, 8), np.float32))
    assert not np.array_equal(render(cluttered, draw_scenes(cluttered, 3, 0)).image, render(cluttered, bare).image)


def test_objects_keep_apart_and_inside():
    options = SceneOptions(max_overlap=0.0, min_objects=3, max_objects=5, min_size=0.15, max_size=0.3)
    scenes = draw_scenes(options, 300, 0)
    rendered = render(options, scenes)
    assert np.array_equal(rendered.area_visible, rendered.area_full)
    assert scenes.present.sum(1).min() >= 2
    low, high = scenes.centre - scenes.radius[..., None], scenes.centre + scenes.radius[..., None]
    assert low[scenes.present].min() >= -1e-4
    assert high[scenes.present].max() <= 64 + 1e-4


def test_long_tailed_frequencies():
    scenes = draw_scenes(SceneOptions(imbalance=20.0), 4000, 0)
    count = np.bincount(scenes.shape[scenes.present], minlength=8)
    assert 12 < count[0] / count[-1] < 32
    assert (np.diff(count) < 0).all()


@pytest.mark.parametrize(
    "options",
    [{"shapes": ("circle", "blob")}, {"colours": ()}, {"background": "sky"}, {"min_size": 0.6, "max_size": 0.5},
     {"min_objects": 4, "max_objects": 3}, {"imbalance": 0.5}, {"textures": ("plain", "plain")}],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, object]):
    with pytest.raises(ConfigError):
        SceneOptions(**options)


def test_flow_follows_the_objects():
    options = SceneOptions(max_objects=1, noise=0.0)
    scenes = one_object(velocity=[3.0, -2.0], ground=0.0)
    video = render_video(options, scenes, 3)
    assert video.image.shape == (1, 3, 3, 64, 64)
    inside = video.instances[0, 0] > 0
    assert np.allclose(video.flow[0, 0, 0][inside], 3.0)
    assert np.allclose(video.flow[0, 0, 1][inside], -2.0)
    assert not video.flow[0, 0][:, ~inside].any()
    assert np.array_equal(np.roll(video.image[0, 0], (-2, 3), (1, 2)), video.image[0, 1])
    assert not video.occluded[0, 0][inside].any()


def test_warping_by_the_flow_restores_the_previous_frame():
    options = SceneOptions(noise=0.0, max_speed=3.0, max_spin=8.0, max_overlap=0.0, max_objects=3, textures=("plain",))
    scenes = draw_scenes(options, 20, 5)
    video = render_video(options, scenes, 2)
    row, column = np.mgrid[:64, :64]
    for item in range(20):
        seen = (video.instances[item, 0] > 0) & ~video.occluded[item, 0]
        x = np.floor(column + 0.5 + video.flow[item, 0, 0]).astype(int)[seen]
        y = np.floor(row + 0.5 + video.flow[item, 0, 1]).astype(int)[seen]
        now, later = video.image[item, 0][:, seen].astype(int), video.image[item, 1][:, y, x].astype(int)
        assert np.median(np.abs(now - later)) <= 1
    turned = at_frame(scenes, 2)
    assert np.allclose(turned.angle, scenes.angle + 2 * scenes.spin)


def test_a_point_that_another_object_covers_is_occluded():
    options = SceneOptions(max_objects=2, noise=0.0)
    scenes = draw_scenes(options, 1, 0)
    scenes = dataclasses.replace(
        scenes, present=np.ones((1, 2), bool), shape=np.zeros((1, 2), int), radius=np.full((1, 2), 8, np.float32),
        centre=np.array([[[20, 32], [44, 32]]], np.float32),
        velocity=np.array([[[0, 0], [-16, 0]]], np.float32), spin=np.zeros((1, 2), np.float32),
    )  # fmt: skip
    video = render_video(options, scenes, 2)
    assert video.occluded[0, 0, 32, 26]
    assert not video.occluded[0, 0, 32, 13]
    assert not video.occluded[0, 0, 32, 44]


def test_captions_name_what_is_there():
    options = SceneOptions()
    scenes = draw_scenes(options, 50, 0)
    sentences = captions(options, scenes)
    assert sentences == captions(options, scenes)
    for item, sentence in enumerate(sentences):
        words = attributes(options, scenes, item)
        named = [name for name in options.shapes if name in sentence.split()]
        assert set(named) <= {word.shape for word in words}
        assert named
    empty = dataclasses.replace(scenes, present=np.zeros_like(scenes.present))
    assert captions(options, empty)[0] == "an empty scene"


def test_relations():
    scenes = draw_scenes(SceneOptions(max_objects=2), 1, 0)
    scenes = dataclasses.replace(scenes, centre=np.array([[[10, 30], [40, 33]]], np.float32))
    assert relation(scenes, 0, 0, 1) == "left of"
    assert relation(scenes, 0, 1, 0) == "right of"


def test_base_and_novel_classes():
    base, novel = base_novel_split(SHAPES, 4, seed=1)
    assert len(novel) == 4
    assert sorted(base + novel) == sorted(SHAPES)
    assert base_novel_split(SHAPES, 4, seed=1) == (base, novel)
    with pytest.raises(ValueError, match="novel"):
        base_novel_split(SHAPES, 12)


def detection(**options: object) -> ShapesDetection:
    return ShapesDetection(**{"batch_size": 8, "steps": 3, "sizes": (40, 10, 20), **options})


def test_detection_batches_follow_the_contract():
    batch = next(iter(detection(masks=True, flip=True).train_dataloader()))
    assert batch["image"].shape == (8, 3, 64, 64)
    assert batch["mask"].shape == (8, 64, 64)
    assert not batch["mask"].any()
    assert batch["index"].dtype == torch.int64
    for item, target in enumerate(batch["targets"]):
        count = len(target["labels"])
        assert target["boxes"].shape == (count, 4)
        assert target["size"].tolist() == [64, 64]
        assert target["masks"].shape == (count, 64, 64)
        for box, mask in zip(target["boxes"] * 64, target["masks"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
            assert torch.allclose(box[:2], torch.stack([x, y]), atol=1e-4)
        covered = target["masks"].any(0) if count else torch.zeros(64, 64, dtype=torch.bool)
        assert torch.equal(batch["semantic"][item] > 0, covered)


def test_splits_differ_limits_hold_and_the_spec_does_not_render(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path))
    module = detection(limit=5)
    assert module.spec.sizes == {"train": 5, "val": 5, "test": 5}
    assert module.spec.num_classes == 8
    assert not any(tmp_path.iterdir())
    assert len(module.source("train")) == 5
    assert torch.equal(module.source("train").image, detection().source("train").image[:5])
    assert not torch.equal(module.source("train").image, module.source("test").image)
    assert not torch.equal(detection(dataset_seed=1, limit=5).source("train").image, module.source("train").image)


def test_hidden_objects_are_not_annotated():
    crowded = {"min_objects": 6, "max_objects": 6, "max_overlap": 1.0, "min_size": 0.4}
    some, most = detection(scene=crowded, min_visible=0.0), detection(scene=crowded, min_visible=0.9)
    assert len(some.source("train").labels) > len(most.source("train").labels) > 0


def test_classification_labels_are_the_shapes():
    module = ShapesClassification(batch_size=8, steps=1, sizes=(60, 10, 20), label_noise=0.5, crop=2, flip=True)
    fields = module.source("train").fields
    assert int((fields["label"] != fields["clean_label"]).sum()) == 30
    assert set(next(iter(module.train_dataloader()))) == {"index", "image", "label", "clean_label", "colour", "texture"}
    scenes, _ = module.scenes("train")
    assert fields["clean_label"].tolist() == scenes.shape[:, 0].tolist()


@pytest.mark.parametrize(
    "options", [{"scene": {"colour": "red"}}, {"boxes": "tight"}, {"sizes": (1, 2)}, {"normalise": "x"}]
)
def test_wrong_module_options_are_refused(options: dict[str, object]):
    with pytest.raises(ConfigError):
        detection(**options)


@pytest.mark.parametrize(
    ("name", "kind"), [("shapes", ShapesDetection), ("shapes_classification", ShapesClassification)]
)
def test_the_configuration_files_have_every_option(name: str, kind: type):
    config = yaml.safe_load((paths.conf_dir() / "data" / f"{name}.yaml").read_text())
    assert config.pop("_target_").endswith(kind.__name__)
    free = {"min_objects", "max_objects", "max_overlap"} if kind is ShapesClassification else set()
    known = set(SceneOptions.__dataclass_fields__) - free - {"max_speed", "max_spin"}
    assert set(config["scene"]) == known
    module = kind(**{**config, "steps": 1, "seed": 0, "limit": 8, "batch_size": 4})
    assert len(next(iter(module.train_dataloader()))["image"]) == 4
