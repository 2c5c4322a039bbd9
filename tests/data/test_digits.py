"""The digits module: splits, subsets, noise, copies."""

from __future__ import annotations

import pytest
import torch
import yaml

from reprise import paths
from reprise.data.digits import Digits
from reprise.errors import ConfigError


def make(**options: object) -> Digits:
    return Digits(**{"batch_size": 50, "steps": 3, **options})


def test_the_default_split_is_disjoint_stratified_and_fixed():
    module = make()
    images = {split: module.source(split).fields["image"].flatten(1) for split in ("train", "val", "test")}
    assert [len(images[split]) for split in images] == [1000, 297, 500]
    assert torch.equal(images["train"], make(seed=9).source("train").fields["image"].flatten(1))
    for split in images:
        count = module.source(split).fields["label"].bincount(minlength=10)
        share = len(images[split]) * torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180]) / 1797
        assert (count - share).abs().max() <= 2
    together = torch.cat(list(images.values()))
    assert len(together.unique(dim=0)) == len(torch.cat([together, images["val"]]).unique(dim=0))
    assert len(together.unique(dim=0)) >= 1797 - 2  # the data set itself has a few equal images


def test_a_batch_has_the_contract_fields_and_the_value_range():
    batch = next(iter(make(value_range=[-1, 1]).train_dataloader()))
    assert batch["image"].shape == (50, 1, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert (float(batch["image"].min()), float(batch["image"].max())) == (-1.0, 1.0)
    assert {name: batch[name].dtype for name in ("label", "clean_label", "index")} == dict.fromkeys(
        ("label", "clean_label", "index"), torch.int64
    )


def test_subsets_depend_on_their_own_seed_only_and_are_stratified():
    one, other = make(train_size=100, seed=1).source("train"), make(train_size=100, seed=2).source("train")
    assert torch.equal(one.fields["image"], other.fields["image"])
    assert not torch.equal(one.fields["image"], make(train_size=100, subset_seed=1).source("train").fields["image"])
    assert one.fields["label"].bincount(minlength=10).sub(10).abs().max() <= 1


def test_label_noise_changes_the_stated_fraction_of_train_labels_only():
    module = make(label_noise=0.3)
    train, test = module.source("train").fields, module.source("test").fields
    assert int((train["label"] != train["clean_label"]).sum()) == 300
    assert torch.equal(test["label"], test["clean_label"])
    assert not torch.equal(train["label"], make(label_noise=0.3, noise_seed=1).source("train").fields["label"])


def test_copies_enlarge_the_evaluation_splits_after_the_originals():
    plain, more = make().source("test").fields, make(copies=4).source("test").fields
    assert len(more["image"]) == 2000
    assert torch.equal(more["image"][:500], plain["image"])
    assert torch.equal(more["label"], plain["label"].repeat(4))
    assert not torch.equal(more["image"][500:1000], more["image"][1000:1500])
    assert torch.equal(more["image"], make(copies=4).source("test").fields["image"])
    assert len(make(copies=4).source("train")) == 1000
    assert make(copies=4).spec.sizes == {"train": 1000, "val": 1188, "test": 2000}


def test_limit_and_shift():
    module = make(limit=20, shift=1)
    assert len(module.source("train")) == 20
    assert set(module.spec.sizes.values()) == {20}
    assert next(iter(module.train_dataloader()))["image"].shape == (50, 1, 8, 8)


@pytest.mark.parametrize(
    "options",
    [{"sizes": [1500, 297, 500]}, {"train_size": 1001}, {"label_noise": 1.5}, {"copies": 0}, {"sizes": [1000, 797]}],
)
def test_wrong_options_are_refused(options: dict[str, object]):
    with pytest.raises(ConfigError):
        make(**options)


def test_the_configuration_file_has_every_option():
    config = yaml.safe_load((paths.conf_dir() / "data" / "digits.yaml").read_text())
    assert config.pop("_target_") == "reprise.data.digits.Digits"
    module = Digits(**{**config, "steps": 1, "seed": 0})
    assert len(next(iter(module.train_dataloader()))["label"]) == config["batch_size"]
