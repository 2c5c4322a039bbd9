"""SMKD's Lightning module: stages, idle parameters, schedules, the released behaviour, evaluation across ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reprise.config import compose
from reprise.errors import CheckpointError, ConfigError
from reprise.papers.smkd.evaluation import FewShotProtocol
from reprise.papers.smkd.module import SMKDModule, in_order, view_names
from reprise.training.run import build

ARMS = ("smkd", "cls_only", "ibot", "ce", "stage1")


def module_of(*overrides: str, arm: str = "smkd") -> SMKDModule:
    made = build(compose(["experiment=smkd/small", "smoke=true", f"arm={arm}", *overrides])).module
    assert isinstance(made, SMKDModule)
    return made


@pytest.mark.parametrize("arm", ARMS)
def test_every_trained_parameter_gets_a_gradient(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What DDP expects, in every arm and with separate heads."""
    for shared in ("true", "false"):
        module = module_of(f"paper.model.shared_head={shared}", arm=arm)
        batch = module.example_batch(8)
        loss: Any = 0.0
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        if module.objective.distils:
            loss = sum(module._distil(batch, 0).values())
        else:
            features = module.student.backbone(batch["global_0"])[:, 0]
            loss = module._cross_entropy(module.classifier(features), batch["label"])
        loss.backward()
        idle = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, (arm, shared, idle)


def test_a_stage_takes_over_everything_but_the_classifier() -> None:
    first, second = module_of(arm="stage1"), module_of(arm="ce")
    state = {name: value + 1 if value.is_floating_point() else value for name, value in first.state_dict().items()}
    second.continue_from(state)
    for name, value in second.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(value, state[name]), name
    second.continue_from(second.state_dict())
    broken = {name: value for name, value in state.items() if "cls_token" not in name}
    with pytest.raises(CheckpointError, match="does not fit"):
        second.continue_from(broken)


def test_as_released_changes_the_objective_alone() -> None:
    paper, released = module_of(), module_of("paper.as_released=true")
    assert (paper.objective.patch_match, paper.objective.same_image, paper.objective.pairs) == (
        "cosine",
        True,
        "global",
    )
    assert released.objective == paper.objective.released()
    assert released.objective.patch_match == "released"
    assert not released.objective.same_image
    weighted = module_of("paper.as_released=true", "paper.objective.attention_weighted=true").objective
    assert weighted.sum_over_images
    assert weighted.same_image_patches


@pytest.mark.parametrize(
    "wrong",
    [
        ["paper.objective.cls_weight=0", "paper.objective.patch_weight=0"],
        ["paper.cross_entropy=1", "paper.cross_entropy_on=views"],
        ["paper.protocol.cls=false", "paper.protocol.weighted=false"],
    ],
)
def test_nothing_to_do_is_an_error(wrong: list[str]) -> None:
    with pytest.raises(ConfigError):
        module_of(*wrong)


def test_too_few_novel_classes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="cannot be drawn"):
        FewShotProtocol(ways=5).evaluate(torch.randn(40, 4), torch.arange(40) % 4)


def test_protocol_names_every_classifier() -> None:
    label = torch.arange(60) % 6
    feature = torch.eye(6)[label] + 0.01 * torch.randn(60, 6)
    found = FewShotProtocol(shots=[1], queries=3, episodes=20, classifier_episodes=4).evaluate(feature, label)
    assert set(found) == {"accuracy_1shot", "interval_1shot", "knn_1shot", "classifier_1shot"}
    assert found["accuracy_1shot"] == found["knn_1shot"] == found["classifier_1shot"] == 1


def test_views_are_taken_by_number() -> None:
    batch: dict[str, Tensor] = dict.fromkeys(["local_10", "global_1", "local_2", "global_0", "label"], torch.zeros(1))
    assert view_names(batch, "global") == ["global_0", "global_1"]
    assert view_names(batch, "local") == ["local_2", "local_10"]


def test_rows_come_back_in_the_order_of_the_items() -> None:
    index = torch.tensor([2, 0, 1])
    feature, label = in_order(index[:, None].float(), index * 10, index)
    assert feature.flatten().tolist() == [0, 1, 2]
    assert label.tolist() == [0, 10, 20]
