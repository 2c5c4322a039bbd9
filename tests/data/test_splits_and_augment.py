"""Stratified splits, label noise, and augmentation with its own draw for every sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reprise.data import augment
from reprise.data.loader import StepLoader, TensorSource, Transform
from reprise.data.splits import long_tail, noisy_labels, stratified_order, stratified_parts
from reprise.seeding import generator


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=5, max_size=200), st.integers(0, 1000), st.floats(0, 1))
def test_every_beginning_of_a_stratified_order_is_stratified(labels: list[int], seed: int, cut: float):
    order = stratified_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    size = round(cut * len(labels))
    part = np.asarray(labels)[order[:size]]
    for value in set(labels):
        assert abs((part == value).sum() - size * labels.count(value) / len(labels)) <= 5


def test_parts_are_disjoint_and_too_large_parts_are_refused():
    parts = stratified_parts([0, 1] * 50, [30, 50, 20], 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    with pytest.raises(ValueError, match="cannot be taken"):
        stratified_parts([0, 1], [2, 1], 0)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.integers(2, 10), st.integers(0, 100))
def test_noisy_labels_are_wrong_where_they_are_changed(fraction: float, classes: int, seed: int):
    clean = np.arange(60) % classes
    noisy = noisy_labels(clean, fraction, classes, seed)
    assert (noisy != clean).sum() == round(fraction * 60)
    assert noisy.min() >= 0
    assert noisy.max() < classes


def test_noise_of_one_class_and_bad_fractions_are_refused():
    with pytest.raises(ValueError, match="two classes"):
        noisy_labels([0, 0], 0.5, 1, 0)
    with pytest.raises(ValueError, match="fraction"):
        noisy_labels([0, 1], -0.1, 2, 0)


def test_long_tail_has_the_stated_imbalance():
    share = long_tail(10, 100.0)
    assert share.sum() == pytest.approx(1)
    assert share[0] / share[-1] == pytest.approx(100)
    assert long_tail(1, 5.0).tolist() == [1.0]
    with pytest.raises(ValueError, match="imbalance"):
        long_tail(3, 0.5)


TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "crop": lambda: augment.RandomCrop(2, fill=[0.1, 0.2, 0.3]),
    "flip": augment.RandomHorizontalFlip,
    "resized": lambda: augment.RandomResizedCrop((8, 8), scale=(0.3, 1.0)),
    "jitter": lambda: augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8, mean=[0.1] * 3, std=[0.5] * 3),
    "grey": lambda: augment.RandomGrayscale(0.5),
    "blur": lambda: augment.GaussianBlur(3),
    "cutout": lambda: augment.Cutout(4),
    "compose": lambda: augment.Compose([augment.RandomCrop(1), augment.RandomHorizontalFlip(), augment.Cutout(2)]),
}


def loader(transform: Transform, world: int = 1, rank: int = 0) -> StepLoader:
    images = torch.rand(40, 3, 8, 8, generator=generator(0, "images"))
    source = TensorSource(image=images, label=torch.arange(40) % 4)
    return StepLoader(source, 16, 3, seed=5, transform=transform, world=world, rank=rank)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_ranks_together_see_what_one_process_sees(name: str):
    whole = loader(TRANSFORMS[name]()).batch(1)["image"]
    parts = [loader(TRANSFORMS[name](), world=4, rank=rank).batch(1)["image"] for rank in range(4)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    assert whole.shape == (16, 3, 8, 8)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_samples_have_draws_of_their_own_and_the_input_is_left_alone(name: str):
    transform = TRANSFORMS[name]()
    image = torch.rand(1, 3, 8, 8, generator=generator(1, "one")).repeat(32, 1, 1, 1)
    before = image.clone()
    changed = transform.apply({"image": image}, transform.draw(32, generator(0, name)))["image"]
    assert torch.equal(image, before)
    assert len(changed.unique(dim=0)) > 1


def test_crop_equals_padding_and_slicing():
    image = torch.rand(5, 3, 6, 7)
    offset = torch.tensor([[0, 0], [4, 4], [2, 2], [1, 3], [3, 0]])
    expected = torch.full((5, 3, 10, 11), 0.5)
    expected[:, :, 2:8, 2:9] = image
    cut = torch.stack([expected[i, :, t : t + 6, left : left + 7] for i, (t, left) in enumerate(offset.tolist())])
    assert torch.equal(augment.crop(image, offset, 2, 0.5), cut)
    assert torch.equal(augment.crop(image, torch.full((5, 2), 2), 2, 0.5), image)


@pytest.mark.parametrize("turn", [-0.4, -0.1, 0.0, 0.25, 0.5])
def test_hue_equals_torchvision(turn: float):
    image = torch.rand(2, 3, 6, 6)
    ours = augment.shift_hue(image, torch.full((2, 1, 1, 1), turn))
    assert torch.allclose(ours, tvf.adjust_hue(image, turn), atol=1e-5)


def test_brightness_contrast_and_saturation_equal_torchvision():
    image = torch.rand(3, 3, 6, 6)
    jitter = augment.ColorJitter(0.5, 0.5, 0.5)
    params = jitter.draw(3, generator(0, "jitter"))
    for item, ours in enumerate(jitter.apply({"image": image}, params)["image"]):
        step = tvf.adjust_brightness(image[item], float(params["brightness"][item]))
        step = tvf.adjust_contrast(step, float(params["contrast"][item]))
        step = tvf.adjust_saturation(step, float(params["saturation"][item]))
        assert torch.allclose(ours, step, atol=2e-3)  # torchvision rounds the weights of red, green and blue


def test_blur_equals_torchvision():
    image = torch.rand(2, 3, 12, 12)
    blur = augment.GaussianBlur(5, p=1.0)
    params = blur.draw(2, generator(0, "blur"))
    for item, ours in enumerate(blur.apply({"image": image}, params)["image"]):
        sigma = float(params["sigma"][item])
        assert torch.allclose(ours, tvf.gaussian_blur(image[item], [5, 5], [sigma, sigma]), atol=1e-5)
    with pytest.raises(ValueError, match="odd"):
        augment.GaussianBlur(4)


def test_resized_crop_of_everything_is_the_image():
    image = torch.rand(2, 3, 8, 8)
    whole = augment.RandomResizedCrop((8, 8), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.allclose(whole.apply({"image": image}, whole.draw(2, generator(0, "crop")))["image"], image, atol=1e-5)


def test_cutout_blanks_one_clipped_square():
    image = torch.ones(64, 1, 10, 10)
    cutout = augment.Cutout(4, fill=-1.0)
    blank = (cutout.apply({"image": image}, cutout.draw(64, generator(0, "cut")))["image"] == -1).sum((1, 2, 3))
    assert int(blank.max()) == 16
    assert int(blank.min()) >= 4


def test_flipping_a_padded_detection_batch_keeps_boxes_on_their_objects():
    image, mask, semantic = torch.zeros(2, 1, 4, 8), torch.ones(2, 4, 8, dtype=torch.bool), torch.zeros(2, 4, 8).long()
    mask[:, :, :6] = False
    image[:, :, 1, 0:2], semantic[:, 1, 0:2] = 1.0, 1
    masks = (semantic > 0)[:, None]
    box = torch.tensor([[1 / 6, 0.375, 2 / 6, 0.25]])
    size = torch.tensor([4, 6])
    targets = [{"boxes": box, "labels": torch.tensor([0]), "size": size, "masks": masks[i]} for i in range(2)]
    batch = {"image": image, "mask": mask, "targets": targets, "semantic": semantic}
    flipped = augment.RandomHorizontalFlip().apply(batch, {"flip": torch.tensor([True, False])})
    assert flipped["image"][0, 0, 1].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert torch.allclose(flipped["targets"][0]["boxes"], torch.tensor([[5 / 6, 0.375, 2 / 6, 0.25]]))
    assert torch.equal(flipped["targets"][0]["masks"][0], flipped["image"][0, 0] > 0)
    assert torch.equal(flipped["semantic"][0] > 0, flipped["image"][0, 0] > 0)
    assert torch.equal(flipped["image"][1], image[1])
    assert torch.equal(targets[0]["boxes"], box)


def mixed(transform: augment.Mix) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batch = {"image": torch.rand(8, 3, 6, 6), "label": torch.arange(8)}
    return batch, transform.apply(batch, transform.draw(8, generator(0, "mix")))


def test_mixup_blends_with_the_mirrored_item():
    batch, out = mixed(augment.Mix(1.0))
    weight = out["mix_weight"][:, None, None, None]
    assert torch.equal(out["mix_label"], batch["label"].flip(0))
    assert torch.allclose(out["image"], weight * batch["image"] + (1 - weight) * batch["image"].flip(0))
    assert len(out["mix_weight"].unique()) == 8


def test_cutmix_weights_are_the_shares_of_kept_pixels():
    batch, out = mixed(augment.Mix(None, 1.0))
    kept = (out["image"] == batch["image"]).all(1).float().mean((1, 2))
    assert torch.allclose(kept, out["mix_weight"])
    assert out["mix_weight"].min() < 1


def test_mixing_with_both_uses_both_and_with_none_is_refused():
    both = augment.Mix(0.2, 1.0)
    assert len(both.draw(64, generator(0, "both"))["cut"].unique()) == 2
    with pytest.raises(ValueError, match="at least one"):
        augment.Mix(None, None)
