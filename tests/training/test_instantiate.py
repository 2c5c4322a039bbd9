"""The strict helper: clear messages for wrong options, errors of users' parts passed on."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from torch import nn

from reprise.errors import ConfigError, DataError
from reprise.training.instantiate import instantiate


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
