"""CIFAR-10 from both layouts, on small fakes, and on the real images where they are."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from reprise import paths
from reprise.data import cifar10, registry
from reprise.data.cifar10 import CIFAR10
from reprise.data.pickles import load_pickle
from reprise.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root and cache; the fakes have 100 training and 20 test images."""
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(cifar10.COUNTS, "train", 100)
    monkeypatch.setitem(cifar10.COUNTS, "test", 20)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def write_pickles(root: Path) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*cifar10.PICKLES["train"], "test_batch"]):
        content = {
            b"data": pixels(20, number).reshape(20, -1),
            b"labels": [k % 10 for k in range(20)],
            b"batch_label": b"x",
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def write_folder(root: Path) -> Path:
    folder = root / "cifar10"
    for split, count in (("train", 10), ("test", 2)):
        for label, name in enumerate(cifar10.CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number, image in enumerate(pixels(count, label)):
                Image.fromarray(image.transpose(1, 2, 0)).save(folder / split / name / f"{number:04}.png")
    return folder


def make(**options: object) -> CIFAR10:
    return CIFAR10(**{"batch_size": 10, "steps": 2, "val_size": 20, "eval_batch_size": 10, **options})


@pytest.mark.parametrize("write", [write_pickles, write_folder])
def test_both_layouts_are_read_split_and_cached(root: Path, write, monkeypatch: pytest.MonkeyPatch):
    write(root)
    module = make(label_noise=0.5)
    assert {split: len(module.source(split)) for split in module.spec.sizes} == module.spec.sizes
    assert module.spec.sizes == {"train": 80, "val": 20, "test": 20}
    for split, each in (("train", 8), ("val", 2), ("test", 2)):
        assert module.source(split).fields["clean_label"].bincount().tolist() == [each] * 10
    train = module.source("train").fields
    assert int((train["label"] != train["clean_label"]).sum()) == 40
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (10, 3, 32, 32)
    monkeypatch.setattr(cifar10, "_read_pickles", None)
    monkeypatch.setattr(cifar10, "_read_images", None)
    assert torch.equal(make().source("val").image, module.source("val").image)  # from the cache


def test_images_keep_their_labels(root: Path):
    write_folder(root)
    source = make(train_size=40, subset_seed=3).source("train")
    assert source.fields["label"].bincount().tolist() == [4] * 10
    for image, label in zip(source.image, source.fields["label"].tolist(), strict=True):
        assert (torch.from_numpy(pixels(10, label)) == image).all((1, 2, 3)).any()


def test_augmentation_and_normalisation(root: Path):
    write_pickles(root)
    plain = make(crop=0, flip=False, normalise="symmetric")
    assert plain.train_transform() is None
    assert -1 <= float(next(iter(plain.train_dataloader()))["image"].min()) < -0.9
    cut = next(iter(make(crop=0, flip=False, cutout=8).train_dataloader()))["image"]
    assert 16 <= int((cut == 0).all(1).sum((1, 2)).min()) <= 64
    assert make(limit=7).spec.sizes == {"train": 7, "val": 7, "test": 7}
    with pytest.raises(ConfigError, match="normalisation"):
        make(normalise="other")


@pytest.mark.parametrize("options", [{"val_size": -1}, {"val_size": 100}, {"train_size": 81}, {"label_noise": 2}])
def test_wrong_options_are_refused(root: Path, options: dict[str, object]):
    with pytest.raises(ConfigError):
        make(**options)


def test_missing_data_says_where_and_how(root: Path):
    assert make().spec.num_classes == 10  # needs no data
    with pytest.raises(DataError) as caught:
        make().source("train")
    assert str(root) in str(caught.value)
    assert "reprise data fetch cifar10" in str(caught.value)
    assert registry.check("cifar10").state == "missing"


def test_truncated_pickles(root: Path):
    folder = write_pickles(root)
    os.truncate(folder / "data_batch_3", 5000)
    with pytest.raises(DataError, match="data_batch_3"):
        make().source("train")
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="lacks data_batch_3"):
        make().source("train")


def test_foreign_pickles(root: Path):
    folder = write_pickles(root)
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": np.zeros((20, 5)), b"labels": [0] * 20}, protocol=2))
    with pytest.raises(DataError, match="not a CIFAR-10 batch"):
        make().source("train")
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": pixels(20, 0).reshape(20, -1), b"labels": [11] * 20}))
    with pytest.raises(DataError, match="images a class"):
        make().source("train")


def test_truncated_and_foreign_image_folders(root: Path):
    folder = write_folder(root)
    (folder / "train" / "cat" / "0003.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0003\.png is not a readable image"):
        make().source("train")
    Image.new("RGB", (31, 32)).save(folder / "train" / "cat" / "0003.png")
    with pytest.raises(DataError, match="31x32"):
        make().source("train")
    (folder / "train" / "cat" / "0003.png").unlink()
    with pytest.raises(DataError, match="99 images"):
        make().source("train")
    assert registry.check("cifar10").state == "damaged"


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch /tmp/reprise-was-here",))


@pytest.mark.parametrize("content", [Evil(), {b"data": Evil()}, np.array([Evil()], object), b"".join])
def test_pickles_cannot_run_code(tmp_path: Path, content: object):
    path = tmp_path / "evil"
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match="not allowed"):
        load_pickle(path)
    assert not Path("/tmp/reprise-was-here").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_plain_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int):
    content = {b"a": np.arange(6, dtype=np.uint8).reshape(2, 3), b"b": [1, 2.5, "x"], b"c": np.array([1.0, -2.0])}
    (tmp_path / "plain").write_bytes(pickle.dumps(content, protocol=protocol))
    read = load_pickle(tmp_path / "plain")
    assert read[b"a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read[b"b"][:2] == [1, 2.5]
    assert read[b"c"].tolist() == [1.0, -2.0]


def test_the_configuration_file_has_every_option():
    config = yaml.safe_load((paths.conf_dir() / "data" / "cifar10.yaml").read_text())
    assert config.pop("_target_") == "reprise.data.cifar10.CIFAR10"
    CIFAR10(**{**config, "steps": 1, "seed": 0})


@pytest.mark.slow
def test_the_real_images():
    if not os.environ.get("REPRISE_DATA") or registry.check("cifar10").state == "missing":
        pytest.skip("CIFAR-10 is not below REPRISE_DATA")
    module = CIFAR10(batch_size=100, steps=1)
    assert {split: len(module.source(split)) for split in ("train", "val", "test")} == module.spec.sizes
    image = module.source("train").fetch(torch.arange(5000))["image"]
    assert image.mean((0, 2, 3)).abs().max() < 0.05
    assert (image.std((0, 2, 3)) - 1).abs().max() < 0.05
    assert registry.check("cifar10").facts == {"train": 50_000, "test": 10_000}


def test_without_held_out_images_all_train_and_the_test_images_validate(root: Path):
    write_pickles(root)
    module = make(val_size=0)
    assert {split: len(module.source(split)) for split in ("train", "val", "test")} == {
        "train": 100,
        "val": 20,
        "test": 20,
    }
    assert dict(module.spec.sizes) == {"train": 100, "val": 20, "test": 20}
    images = [module.source(split).fetch(torch.arange(20))["image"] for split in ("val", "test")]
    assert torch.equal(*images)
