"""The strict helper: clear messages for wrong options, errors of users' parts passed on."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from torch import nn

from reprise.errors import ConfigError, DataError
from reprise.training.instantiate import check_values, instantiate


def test_it_builds_nested_parts_and_partials() -> None:
    config = OmegaConf.create({"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.ReLU"}]})
    assert isinstance(instantiate(config, path="model")[0], nn.ReLU)


def test_an_unknown_option_is_named_with_those_that_exist() -> None:
    config = OmegaConf.create({"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1, "widht": 3})
    with pytest.raises(ConfigError, match="widht") as caught:
        instantiate(config, path="paper.model")
    assert "out_features" in str(caught.value)
    assert "paper.model" in str(caught.value)


def test_errors_of_a_part_keep_their_own_message() -> None:
    config = OmegaConf.create(
        {"_target_": "reprise.data.digits.Digits", "batch_size": 1, "steps": 1, "sizes": [9000, 1, 1]}
    )
    with pytest.raises((ConfigError, DataError), match="9000"):
        instantiate(config, path="data")


@pytest.mark.parametrize(
    ("key", "value", "is_right"),
    [
        ("batch_size", 8, True),
        ("batch_size", True, False),
        ("batch_size", None, False),
        ("label_noise", 0, True),
        ("label_noise", "0.1x", False),
        ("train_size", None, True),
        ("train_size", 1.5, False),
        ("unheard_of", "x", True),  # of that the constructor complains
    ],
)
def test_values_have_the_annotated_types(key: str, value: object, is_right: bool) -> None:
    config = {"parts": [{"_target_": "reprise.data.digits.Digits", key: value}]}
    if is_right:
        check_values(config, "data")
        return
    with pytest.raises(ConfigError, match=rf"data\.parts\[0\]\.{key} must be .*, not"):
        check_values(config, "data")
