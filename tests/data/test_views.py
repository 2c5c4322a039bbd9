"""Random views: own draws, sizes, equality over ranks, and the pipelines of the released code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from reprise.data.imagenet_views import pillow_blur, random_view
from reprise.data.images import ImageSource, Normalisation
from reprise.data.loader import StepLoader
from reprise.data.shapes.dataset import ShapesClassification
from reprise.data.views import Solarize, ViewOptions, Views, multi_view
from reprise.errors import ConfigError
from reprise.seeding import generator

UNIT = Normalisation((0.0,) * 3, (1.0,) * 3)
EVERYTHING = {"size": 12, "blur_p": 0.5, "solarize_p": 0.2}


def images(count: int = 6, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def test_every_view_has_its_size_and_its_own_draw() -> None:
    views = multi_view({"whole": EVERYTHING, "local": {"size": 8, "count": 2, "scale": [0.05, 0.4]}}, UNIT)
    batch = {"image": images().float() / 255, "label": torch.arange(6)}
    made = views.apply(batch, views.draw(6, generator(0)))
    assert made.keys() == {"image", "label", "whole", "local_0", "local_1"}
    assert made["whole"].shape == (6, 3, 12, 12)
    assert made["local_0"].shape == (6, 3, 8, 8)
    assert not torch.equal(made["local_0"], made["local_1"])
    assert torch.equal(made["image"], batch["image"])


def test_views_do_not_depend_on_the_number_of_ranks() -> None:
    source = ImageSource(images(20), UNIT, label=torch.arange(20))
    views = multi_view({"one": EVERYTHING, "two": EVERYTHING}, UNIT)
    whole = StepLoader(source, 8, 3, seed=1, transform=views).batch(2)
    parts = [StepLoader(source, 8, 3, seed=1, rank=rank, world=2, transform=views).batch(2) for rank in range(2)]
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=0, atol=0)


def test_normalised_images_give_the_same_views() -> None:
    space = Normalisation((0.3, 0.4, 0.5), (0.2, 0.25, 0.3))
    plain, normalised = (multi_view({"v": EVERYTHING}, one) for one in (UNIT, space))
    pixels = images()
    one = plain.apply({"image": UNIT.apply(pixels)}, plain.draw(6, generator(3)))["v"]
    other = normalised.apply({"image": space.apply(pixels)}, normalised.draw(6, generator(3)))["v"]
    torch.testing.assert_close(space.invert(other), one.clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_solarize_is_pillows() -> None:
    pixels = images(2)
    found = Solarize(p=1.0).apply({"image": pixels.float() / 255}, {"chosen": torch.ones(2, dtype=torch.bool)})["image"]
    for one, ours in zip(pixels, found, strict=True):
        picture = ImageOps.solarize(Image.fromarray(one.permute(1, 2, 0).numpy()))
        theirs = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)
        assert torch.equal((255 * ours).round().to(torch.uint8), theirs)


def test_tensor_blur_is_near_pillows() -> None:
    pixels = images(1, 32)
    options = ViewOptions(size=32, scale=(1.0, 1.0), jitter_p=0, grayscale_p=0, flip_p=0, blur_p=1.0, blur_kernel=13)
    blur = options.transform(UNIT).transforms[1]
    params = {"sigma": torch.tensor([1.5]), "chosen": torch.tensor([True])}
    ours = blur.apply({"image": pixels.float() / 255}, params)["image"][0, :, 6:-6, 6:-6]
    theirs = pillow_blur(pixels[0], 1.5)[:, 6:-6, 6:-6].float() / 255
    assert (ours - theirs).abs().max() < 10 / 255


def test_itemwise_view_follows_the_generator() -> None:
    options = ViewOptions(size=10, blur_p=0.5, solarize_p=0.5)
    torch.manual_seed(5)
    first = random_view(images(1, 24)[0], options)
    assert first.shape == (3, 10, 10)
    assert first.dtype == torch.uint8


def test_data_module_wraps_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path))
    base = ShapesClassification(scene={"image_size": 16}, sizes=[12, 4, 4], batch_size=4, steps=2)
    data = Views(base=base, views={"view1": {"size": 16}}, batch_size=4, steps=2)
    batch = data.train_dataloader().batch(0)
    assert batch["view1"].shape == batch["image"].shape == (4, 3, 16, 16)
    assert "view1" not in data.source("test").fetch(torch.arange(2))
    assert data.spec.classes == base.spec.classes


@pytest.mark.parametrize(
    ("views", "problem"),
    [
        ({}, "no views"),
        ({"a": {"size": 8, "sise": 2}}, "unknown view options"),
        ({"a": {"blur_p": 1.0}}, "needs a size"),
    ],
)
def test_wrong_options_are_named(views: dict[str, dict[str, float]], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        multi_view(views, UNIT)
