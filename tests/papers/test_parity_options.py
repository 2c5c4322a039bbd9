"""Parity adapters with options that no stored case has: made from stored cases by changing their config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reprise.golden import GoldenCase, clip_gradients, load_case
from reprise.papers.detr.parity import ADAPTERS as DETR
from reprise.papers.fedntd.parity import ADAPTERS as FEDNTD
from reprise.papers.incremental_detr.official import detector_of
from reprise.papers.incremental_detr.parity import ADAPTERS as INCREMENTAL_DETR
from reprise.papers.sam.parity import ADAPTERS as SAM
from reprise.papers.smkd.parity import ADAPTERS as SMKD
from reprise.papers.transformer.parity import ADAPTERS as TRANSFORMER
from reprise.papers.vit.parity import ADAPTERS as VIT

ADAPTERS = {**DETR, **FEDNTD, **INCREMENTAL_DETR, **SAM, **SMKD, **TRANSFORMER, **VIT}


def stored(goldens: Path, name: str, **changes: Any) -> GoldenCase:
    if not (goldens / name).is_dir():
        pytest.skip(f"no golden case {name}")
    case = load_case(goldens / name).case
    return replace(case, config={**case.config, **changes})


def run(case: GoldenCase) -> Mapping[str, Tensor]:
    return ADAPTERS[case.kind](case)


def test_pseudo_objects_have_weights_of_their_own(goldens: Path) -> None:
    names = ("ce", "bbox", "giou")
    usual = run(stored(goldens, "incremental_detr/base_criterion"))
    weights = {f"loss_{name}_select_coef": value for name, value in zip(names, (3, 1, 4), strict=True)}
    other = run(stored(goldens, "incremental_detr/base_criterion", **weights))
    pairs = zip(names, (3 - 2, 1 - 5, 4 - 2), strict=True)
    expected = sum(change * usual[f"loss/loss_{name}_select"] for name, change in pairs)
    torch.testing.assert_close(other["loss_total"] - usual["loss_total"], torch.as_tensor(expected), atol=1e-5, rtol=0)


def test_no_limit_of_the_norm_is_no_clipping() -> None:
    leaf = torch.ones(4, requires_grad=True)
    leaf.sum().backward()
    assert clip_gradients([leaf], 0).item() == 2.0
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones(4))
    clip_gradients([leaf], 1.0)
    assert leaf.grad.norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["detr/train_steps", "incremental_detr/inc_train_steps"])
def test_training_without_clipping_moves_the_weights(goldens: Path, name: str) -> None:
    zero, huge = (run(stored(goldens, name, clip_max_norm=limit)) for limit in (0, 1e9))
    assert all(torch.equal(value, huge[key]) for key, value in zero.items())


def test_a_frozen_backbone_keeps_its_group(goldens: Path) -> None:
    case = stored(goldens, "detr/train_steps")
    case = stored(goldens, "detr/train_steps", backbone={**case.config["backbone"], "train_backbone": False})
    assert run(case)["lr_step0"].tolist() == pytest.approx([case.config["lr"], case.config["lr_backbone"]])


def test_the_perceptron_takes_images_as_they_are(goldens: Path) -> None:
    flat = stored(goldens, "sam/google_sgd")
    x = flat.inputs["x"]
    folded = replace(
        flat,
        config={**flat.config, "input_shape": [1, x.shape[-1], 1]},
        inputs={**flat.inputs, "x": x.reshape(*x.shape[:2], 1, -1, 1)},
    )
    split = stored(goldens, "sam/google_batchnorm", model="mlp", input_shape=[6, 6, 3], widths=[3])
    kernel = torch.linspace(-1, 1, 108 * 3).reshape(108, 3)
    split = replace(split, weights={"Dense_0.kernel": kernel, "Dense_0.bias": torch.zeros(3)})
    logits = split.inputs["x"][0].flatten(1) @ kernel
    loss = torch.nn.functional.cross_entropy(logits, split.inputs["y"][0], label_smoothing=0.1)
    plain = replace(split, config={**split.config, "sam_rho": 0.0})
    torch.testing.assert_close(run(plain)["step0/loss_perturbed"], loss)
    assert all(torch.equal(value, run(folded)[key]) for key, value in run(flat).items())


@pytest.mark.parametrize("name", ["sam/sam_sgd", "sam/asam_sgd"])
def test_a_ball_without_radius_has_its_norm(goldens: Path, name: str) -> None:
    norm, none = run(stored(goldens, name)), run(stored(goldens, name, rho=0.0))
    assert none.keys() == norm.keys()
    torch.testing.assert_close(none["step0/grad_norm"], norm["step0/grad_norm"])
    assert none["step0/loss"] == none["step0/loss_perturbed"]


def test_the_release_counts_two_batches_a_step_whatever_the_radius(goldens: Path) -> None:
    norm, none = run(stored(goldens, "sam/wide_resnet_bn")), run(stored(goldens, "sam/wide_resnet_bn", rho=0.0))
    assert none.keys() == norm.keys()
    counters = [name for name in norm if name.endswith("num_batches_tracked")]
    assert counters
    assert all(torch.equal(none[name], norm[name]) for name in counters)


def test_the_jax_code_does_not_clip_to_a_norm_of_zero(goldens: Path) -> None:
    zero, huge = (run(stored(goldens, "sam/google_sgd", gradient_clipping=limit)) for limit in (0, 1e9))
    assert zero["step0/grad_norm_after_clipping"] > 0
    torch.testing.assert_close(dict(zero), dict(huge))


def test_an_accumulator_without_a_type_has_that_of_the_weights(goldens: Path) -> None:
    none, full = (
        run(stored(goldens, "vit/finetune_drop_head", accumulator_dtype=kind, steps=2)) for kind in (None, "float32")
    )
    assert torch.equal(none["losses"], full["losses"])


def test_rates_of_the_released_sets(goldens: Path) -> None:
    dim, warmup = 16, 40

    def rates(**changes: Any) -> list[float]:
        return run(stored(goldens, "transformer/train_steps", **changes))["lr"].tolist()

    ramp = [dim**-0.5 * step * warmup**-1.5 for step in range(5)]
    assert rates() == pytest.approx(ramp[1:])
    setting = {"hparams_set": "v3", "override": {"hidden_size": dim, "learning_rate_warmup_steps": warmup}}
    case = stored(goldens, "transformer/learning_rate", settings=[{**setting, "steps": [0, 1, 40, 160]}])
    expected = [0, 2 * ramp[1], 2 * (dim * 40) ** -0.5, 2 * (dim * 160) ** -0.5]
    assert run(case)["lr0"].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="v9"):
        rates(hparams_set="v9")


def test_train_steps_follow_their_set(goldens: Path) -> None:
    case = stored(goldens, "transformer/train_steps", hparams_set="v2")
    old = "layer_postprocess"
    weights = {name.replace(old, "layer_prepostprocess"): value for name, value in case.weights.items()}
    norm = {name: value for name, value in weights.items() if "encoder/layer_0/ffn/layer_prepostprocess" in name}
    for stack in ("encoder", "decoder"):
        for name, value in norm.items():
            last = name.rsplit("/", 1)[-1]
            weights[f"transformer/body/{stack}/layer_prepostprocess/layer_norm/{last}"] = value
    rates = run(replace(case, weights=weights))["lr"]
    assert rates[0].item() == pytest.approx(2 * 16**-0.5 * 40**-1.5)


def test_every_algorithm_of_the_release_runs(goldens: Path) -> None:
    plain = run(stored(goldens, "fedntd/rounds_fedavg"))
    options: dict[str, dict[str, float]] = {
        "fedcurv": {"size": 500, "lam": 1.0},
        "fedprox": {"mu": 1.0},
        "fedavgm": {"avgm_beta": 0.7},
        "feddyn": {"dyn_alpha": 0.1},
        "moon": {"mu": 1.0, "tau": 0.5},
        "fedkd": {},
        "fednova": {},
        "scaffold": {},
    }
    for name, values in options.items():
        found = run(stored(goldens, "fedntd/rounds_fedavg", algo=name, **values))
        assert found.keys() == plain.keys()
        assert not torch.equal(found["round2/losses"], plain["round2/losses"]), name


def second_stage(goldens: Path, **changes: Any) -> GoldenCase:
    """A stage-2 case with random networks of other options."""
    case = stored(goldens, "incremental_detr/inc_model", **changes)
    weights: dict[str, Tensor] = {}
    for branch in ("", "_base"):
        state = detector_of(case.config, case.config["num_classes"]).state_dict()
        for key, value in state.items():
            first, _, rest = key.partition(".")
            name = f"{first}{branch}.{rest}" if first != "query_embed" else key
            random = torch.rand_like(value) if key.endswith("running_var") else torch.randn_like(value) / 8
            weights[name.replace("decoder.bbox_embed.", f"decoder.bbox_embed{branch}.")] = random
    return replace(case, weights=weights)


def test_the_release_distils_the_first_level_alone(goldens: Path) -> None:
    grads = [f"input_proj.{level}.0.weight" for level in range(3)]
    found = run(second_stage(goldens, num_feature_levels=3, grads=grads))
    assert found["grad_loss_kd_only_input_proj.0.0.weight"].abs().max() > 0
    assert found["grad_loss_kd_only_input_proj.2.0.weight"].abs().max() == 0


def test_the_released_teacher_does_not_refine_its_boxes(goldens: Path) -> None:
    case = second_stage(goldens, with_box_refine=True)
    found = run(case)
    heads = [key for key in case.weights if key.startswith("transformer_base.decoder.bbox_embed_base.")]
    assert heads
    other = run(replace(case, weights={key: value for key, value in case.weights.items() if key not in heads}))
    assert torch.equal(found["boxes_base"], other["boxes_base"])
    assert found["boxes"].shape == found["boxes_base"].shape


def test_a_pairing_that_the_release_cannot_do_has_no_released_value(goldens: Path) -> None:
    case = stored(goldens, "incremental_detr/inc_class_kd")
    scenarios = [dict(one) for one in case.config["scenarios"]]
    scenarios[0]["target_counts"] = [2, 0]  # two rows against three
    inputs = {**case.inputs, "s0_tgt1_boxes": torch.zeros(0, 4), "s0_tgt1_labels": torch.zeros(0, dtype=torch.int64)}
    found = run(replace(case, config={**case.config, "scenarios": scenarios}, inputs=inputs))
    assert "s0_loss_cls_kd" not in found
    assert {"s0_loss_intended", "s0_loss_producer", "s1_loss_cls_kd"} <= found.keys()


def test_the_optional_classifier_is_trained_with_the_student(goldens: Path) -> None:
    options = {"supervised_loss": True, "celoss_coefficient": 1.0, "run_epochs": 2}
    case = stored(goldens, "smkd/train_phase2", **options)
    width = case.config["head"]["out_dim"]
    head = {"ce_loss.linear.weight": torch.randn(5, width), "ce_loss.linear.bias": torch.zeros(5)}
    found = run(replace(case, weights={**case.weights, **head}))
    for name, value in head.items():
        assert not torch.equal(found[f"final/{name}"], value)
        assert (found[f"final/{name}"] - value).abs().max() < 0.1


def test_epsilon_is_added_as_tensorflow_does(goldens: Path) -> None:
    case = stored(goldens, "transformer/train_steps", epsilon=0.1, steps=1)
    found, rate = run(case), float(run(case)["lr"][0])
    beta2 = case.config.get("beta2", 0.98)
    beta1 = case.config.get("beta1", 0.9)
    name = next(name for name in case.weights if name.endswith("q/kernel"))
    tiny = run(stored(goldens, "transformer/train_steps", epsilon=1e-30, steps=1))
    assert torch.allclose((tiny[f"final/{name}"] - case.weights[name]).abs().max(), torch.tensor(rate), rtol=1e-2)
    moved = case.weights[name] - found[f"final/{name}"]
    scale = rate * np.sqrt(1 - beta2) / (1 - beta1)
    gradient = moved * 0.1 / (scale * (1 - beta1) - moved * np.sqrt(1 - beta2) * moved.sign())  # solved for g
    expected = scale * (1 - beta1) * gradient / (np.sqrt(1 - beta2) * gradient.abs() + 0.1)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-9)
    assert gradient.abs().max() < 10


def test_the_released_signal_is_computed_in_float32(goldens: Path) -> None:
    case = stored(goldens, "transformer/timing_signal", settings=[[10, 32, 1.0, 1e4, 1000]])
    count = 16
    increment = np.float32(np.log(1e4) / (count - 1))
    scale = np.exp(-np.arange(count, dtype=np.float32) * increment)
    angle = np.arange(1000, 1010, dtype=np.float32)[:, None] * scale
    expected = np.concatenate([np.sin(angle), np.cos(angle)], 1)
    np.testing.assert_allclose(run(case)["signal0"][0].numpy(), expected, atol=2e-5, rtol=1e-4)


def test_an_unknown_option_of_the_rate_is_an_error(goldens: Path) -> None:
    setting = {"hparams_set": "v3", "steps": [5], "override": {"learning_rate_schedule": "legacy"}}
    with pytest.raises(ValueError, match="learning_rate_schedule"):
        run(stored(goldens, "transformer/learning_rate", settings=[setting]))
