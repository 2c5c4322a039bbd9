"""The Lightning module: clamp, weight decay, released behaviour, metrics, pictures."""

from __future__ import annotations

import math

import pytest
import torch

from reprise.config import compose
from reprise.data.captions import CaptionedShapes
from reprise.errors import ConfigError
from reprise.papers.clip.module import CLIPModule
from reprise.training.run import build, train


def parts(*overrides: str) -> tuple[CLIPModule, CaptionedShapes]:
    built = build(compose(["experiment=clip/small", "smoke=true", *overrides]))
    assert isinstance(built.module, CLIPModule)
    assert isinstance(built.data, CaptionedShapes)
    return built.module, built.data


def test_the_scale_is_clamped_after_each_step() -> None:
    module, _ = parts()
    for given, paper, released in ((9.0, math.log(100), math.log(100)), (-1.0, -1.0, 0.0)):
        for as_released, wanted in ((False, paper), (True, released)):
            module.as_released = as_released
            with torch.no_grad():
                module.model.logit_scale.fill_(given)
            module.on_train_batch_end(None, {}, 0)
            assert module.model.logit_scale.item() == pytest.approx(wanted)


def test_only_weights_decay() -> None:
    module, _ = parts()
    names = {id(value): name for name, value in module.named_parameters()}
    decayed, others = ([names[id(value)] for value in group["params"]] for group in module.parameter_groups())
    assert all(name.endswith(("weight", "embedding", "projection")) for name in decayed)
    assert not any(".bn" in name or ".ln_" in name or "bias" in name or "scale" in name for name in decayed)
    assert "model.logit_scale" in others
    assert len(decayed) + len(others) == len(names)


def test_rivals_train_only_what_they_use() -> None:
    module, _ = parts("arm=bag_of_words")
    trained = {name.split(".")[1] for name, value in module.named_parameters() if value.requires_grad}
    assert trained == {"visual", "head"}
    fixed, _ = parts("arm=fixed_scale")
    assert not fixed.model.logit_scale.requires_grad
    assert fixed.model.logit_scale.item() == 0.0


def test_released_behaviour_is_a_switch() -> None:
    assert parts()[0].model.text.end_token == 633
    assert parts("paper.as_released=true")[0].model.text.end_token is None


def test_only_the_queue_refuses_sharding() -> None:
    assert set(parts()[0].refuses) == {"accumulation"}
    assert set(parts("paper.objective.name=queued_contrastive")[0].refuses) == {"accumulation", "sharding"}


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="634 tokens, the model 633"):
        train(compose(["experiment=clip/small", "smoke=true", "paper.model.vocab_size=633"]), show_progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["contrastive", "queued_contrastive", "captioning"])
def test_a_run_measures_zero_shot_and_probes(objective: str) -> None:
    overrides = [f"paper.objective.name={objective}", "paper.as_released=true", "steps=2"]
    metrics = train(compose(["experiment=clip/small", "smoke=true", *overrides]), show_progress=False)
    assert {"test/zero_shot", "test/zero_shot_seen", "test/zero_shot_unseen", "test/probe_1"} <= metrics.keys()
    assert ("test/image_to_text_r5" in metrics) == (objective != "captioning")
    assert all(0 <= value <= 1 for value in metrics.values())
