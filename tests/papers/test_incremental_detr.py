"""Incremental-DETR: published sizes, frozen parts, losses against slow formulas, and each trap of the released code."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.checkpoints import assert_equal, imported, recipe_model, save_checkpoint
from torch import Tensor

from reprise.errors import CheckpointError
from reprise.golden import find_cases, load_case
from reprise.nn.boxes import cxcywh_to_xyxy, paired_giou
from reprise.nn.matching import pad_targets
from reprise.papers.incremental_detr.build import build_detector
from reprise.papers.incremental_detr.criterion import IncrementalCriterion, Predictions
from reprise.papers.incremental_detr.distillation import (
    Divergence,
    class_divergence,
    covered_cells,
    feature_distillation,
    released_class_distillation,
    released_distilled_cells,
)
from reprise.papers.incremental_detr.model import DeformableDETR, Trainable
from reprise.papers.incremental_detr.module import IncrementalDetrModule, parameter_groups
from reprise.papers.incremental_detr.parity import ADAPTERS
from reprise.papers.incremental_detr.transformer import inverse_sigmoid, refine
from reprise.papers.incremental_detr.weights import import_weights

ADAMW = partial(torch.optim.AdamW, lr=1e-3)
CLASSES = 5


def _tiny(**options: Any) -> DeformableDETR:
    sizes: dict[str, Any] = {"dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 24}
    stem: dict[str, Any] = {
        "backbone": "conv_stem",
        "dilation": False,
        "stem_widths": (8, 16),
        "num_queries": 6,
        "dropout": 0.1,
    }
    return build_detector(**{"num_classes": CLASSES, **sizes, **stem, **options})


def _weight(module: IncrementalDetrModule, layer: str) -> torch.nn.Parameter:
    return module.model.get_parameter(f"{layer}.weight")


def _count(module: torch.nn.Module, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


def _predictions(layers: int = 2, images: int = 2, queries: int = 6, offset: float = 0.0) -> Predictions:
    logits = torch.randn(layers, images, queries, CLASSES) + offset
    boxes = 0.2 + 0.3 * torch.rand(layers, images, queries, 4)
    return Predictions(logits, boxes, [torch.randn(images, 3, 4, 6)], [torch.zeros(images, 4, 6, dtype=torch.bool)])


def _targets(*counts: int) -> list[dict[str, Tensor]]:
    return [{"labels": torch.arange(m) % CLASSES, "boxes": 0.3 + 0.2 * torch.rand(m, 4)} for m in counts]


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = build_detector(num_classes=91)
    state = model.state_dict()
    assert state["query_embed.weight"].shape == (300, 512)
    assert state["input_proj.0.0.weight"].shape == (256, 2048, 1, 1)
    assert state["class_embed.5.weight"].shape == (91, 256)
    model.train_only("projection_and_class_head")
    assert _count(model, trained=True) == 525_056 + 23_387  # the sheet's numbers
    with torch.device("meta"):
        assert build_detector(num_classes=91, stage="self_supervised").num_classes == 92


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [
        ("class_head", {"class_embed"}),
        ("projection_and_class_head", {"class_embed", "input_proj"}),
        ("projection_and_heads", {"class_embed", "input_proj", "bbox_embed"}),
    ],
)
def test_frozen_parts(trainable: Trainable, parts: set[str]) -> None:
    model = _tiny()
    model.train_only(trainable)
    names = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == parts


def test_all_trains_all_and_others_are_refused() -> None:
    model = _tiny()
    model.train_only("all")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="trainable is 'some'"):
        model.train_only(cast(Any, "some"))


def test_start_of_the_heads() -> None:
    model = _tiny()
    bias = model.get_parameter("class_embed.0.bias")
    assert torch.allclose(bias.sigmoid(), torch.full((CLASSES,), 0.01), atol=1e-6)
    output = model(torch.randn(1, 3, 32, 32))
    sizes = torch.full_like(output.boxes[..., 2:], float(torch.tensor(-2.0).sigmoid()))
    torch.testing.assert_close(output.boxes[..., 2:], sizes)
    torch.testing.assert_close(output.boxes[..., :2], output.transformer.init_reference.expand(2, -1, -1, -1))


def test_refine_moves_points_and_boxes() -> None:
    reference = torch.rand(3, 4) * 0.8 + 0.1
    assert torch.allclose(refine(torch.zeros(3, 4), reference), reference, atol=1e-5)
    from_point = refine(torch.zeros(3, 4), reference[:, :2])
    assert torch.allclose(from_point, torch.cat([reference[:, :2], torch.full((3, 2), 0.5)], 1), atol=1e-5)
    assert inverse_sigmoid(torch.tensor([0.0, 1.0])).isfinite().all()


def test_padding_does_not_change_the_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _tiny(levels=1).eval()
    image = torch.randn(1, 3, 32, 32)
    padded = torch.nn.functional.pad(image, (0, 16, 0, 8))
    mask = torch.ones(1, 40, 48, dtype=torch.bool)
    mask[:, :32, :32] = False
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        alone = model.detect(model.features(image))
        stages = [torch.nn.functional.pad(stage, (0, 4, 0, 2)) for stage in model.features(image).stages]
        features = model.features(padded, mask)
        # group norm sees the padding (as in the official code); so give it the same projected cells
        projected = torch.nn.functional.pad(alone.projected[0], (0, 4, 0, 2))
        monkeypatch.setattr(model, "project", lambda _: [projected])
        found = model.detect(features._replace(stages=stages))
    torch.testing.assert_close(found.boxes, alone.boxes, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits, alone.logits, atol=2e-4, rtol=1e-4)


def test_wrong_builds_are_named() -> None:
    for options, message in (
        ({"levels": 2}, "feature levels"),
        ({"dim": 48}, "32 groups"),
        ({"stage": "later"}, "stage is 'later'"),
        ({"dilation": True}, "no dilation"),
    ):
        with pytest.raises(ValueError, match=message):
            _tiny(**options)


@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (0, 0)])
def test_set_loss_equals_a_loop(counts: tuple[int, int]) -> None:
    found, targets = _predictions(), _targets(*counts)
    criterion = IncrementalCriterion()
    loss, matches = criterion.set_loss(found.logits, found.boxes, pad_targets(targets))
    expected = torch.zeros(())
    count = max(sum(counts), 1)
    for layer in range(2):
        for image, target in enumerate(targets):
            query, wanted = matches.of(layer, image)
            hot = torch.zeros(6, CLASSES)
            hot[query, target["labels"][wanted]] = 1
            p = found.logits[layer, image].sigmoid()
            agree = torch.where(hot == 1, p, 1 - p)
            alpha = torch.where(hot == 1, 0.25, 0.75)
            expected += 2 * (-alpha * (1 - agree) ** 2 * agree.log()).sum() / count
            box, truth = found.boxes[layer, image, query], target["boxes"][wanted]
            giou = paired_giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(truth))
            expected += (5 * (box - truth).abs().sum() + 2 * (1 - giou).sum()) / count
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-5)


def test_proposals_that_overlap_base_objects_are_dropped_and_all_layers_are_trained() -> None:
    found = _predictions()
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2]])}, _targets(0)[0]]
    proposals = [torch.tensor([[0.31, 0.3, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1]]), torch.tensor([[0.3, 0.3, 0.2, 0.2]])]
    only_far = [proposals[0][1:], proposals[1]]
    losses = [IncrementalCriterion().self_supervised(found, targets, some, 4) for some in (proposals, only_far)]
    assert torch.equal(losses[0].total, losses[1].total)
    paper, released = (
        IncrementalCriterion(as_released=flag).self_supervised(found, targets, proposals, 4) for flag in (False, True)
    )
    aux = sum(coef * paper.parts[f"loss_{name}_select_0"] for name, coef in (("ce", 2), ("bbox", 5), ("giou", 2)))
    torch.testing.assert_close(paper.total - released.total, torch.as_tensor(aux))


def test_feature_distillation_leaves_novel_boxes_free() -> None:
    ours = torch.randn(1, 3, 4, 6, requires_grad=True)
    theirs = torch.randn(1, 3, 4, 6)
    boxes = torch.tensor([[[0.505, 0.5, 0.33, 0.5]]])  # columns 2 and 3, rows 1 and 2
    free = covered_cells(boxes, [1], torch.tensor([[6.0, 4.0]]), (4, 6))
    assert free[0].nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    loss = feature_distillation(ours, theirs, free)
    outside = (ours - theirs).square().sum(1)[~free].sum()
    torch.testing.assert_close(loss, outside / (2 * 20))
    loss.backward()
    assert ours.grad is not None
    assert (ours.grad[:, :, free[0]] == 0).all()
    assert feature_distillation(ours, theirs, torch.ones(1, 4, 6, dtype=torch.bool)) == 0


def test_the_released_mask_misses_the_object() -> None:
    box = torch.tensor([[0.75, 0.75, 0.3, 0.3]])
    free = covered_cells(box[None], [1], torch.tensor([[20.0, 20.0]]), (20, 20))[0]
    released = released_distilled_cells(box, (320, 320), (20, 20))
    assert released.all()  # one box covers nothing, because only cells in two boxes are free
    twice = ~released_distilled_cells(box.repeat(2, 1), (320, 320), (20, 20))
    assert twice.nonzero().amax() <= 16  # the stride, not the feature size
    assert not torch.equal(twice, free)


def test_pseudo_targets_are_sure_and_away_from_novel_objects() -> None:
    criterion = IncrementalCriterion()
    logits = torch.full((1, 3, CLASSES), -5.0)
    logits[0, 0, 1], logits[0, 1, 2] = 3.0, 3.0
    boxes = torch.tensor([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.2, 0.8, 0.1, 0.1]]])
    novel = pad_targets([{"labels": torch.tensor([4]), "boxes": boxes[0, :1]}])
    pseudo, queries = criterion.pseudo_targets(logits, boxes, novel)
    assert queries[0].tolist() == [1]
    assert pseudo.labels.tolist() == [[2]]
    everything, _ = criterion.pseudo_targets(logits, boxes, pad_targets(_targets(0)))
    assert everything.counts == (2,)


def test_class_distillation_pairs_the_query_that_made_the_target() -> None:
    criterion = IncrementalCriterion()
    found, teacher, novel = _predictions(offset=-1.0), _predictions(offset=0.5), pad_targets(_targets(1, 0))
    loss = criterion.class_kd(found.logits, found.boxes, teacher.logits, teacher.boxes, novel)
    for layer in range(2):
        pseudo, queries = criterion.pseudo_targets(teacher.logits[layer], teacher.boxes[layer], novel)
        matches = criterion.match(found.logits[layer][None], found.boxes[layer][None], pseudo)
        values = []
        for image in range(2):
            for query, target in zip(*(index.tolist() for index in matches.of(0, image)), strict=True):
                q = teacher.logits[layer, image, queries[image][target]].softmax(-1)
                p = found.logits[layer, image, query].softmax(-1)
                values.append((q * (q.log() - p.log())).sum())
        torch.testing.assert_close(loss[layer], torch.stack(values).mean(), rtol=1e-4, atol=1e-6)


def test_no_pseudo_target_gives_zero_with_a_gradient() -> None:
    found, teacher = _predictions(), _predictions(offset=-20.0)
    logits = found.logits.clone().requires_grad_()
    loss = IncrementalCriterion().class_kd(
        logits, found.boxes, teacher.logits, teacher.boxes, pad_targets(_targets(1, 0))
    )
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_divergence_is_zero_for_equal_rows_and_positive_else(kind: Divergence) -> None:
    rows = torch.randn(4, CLASSES)
    assert class_divergence(rows, rows, kind).abs().max() < 1e-6
    assert (class_divergence(rows, rows.roll(1, 0), kind) > 0).all()


def test_released_class_distillation_stops_at_unequal_counts() -> None:
    student, teacher = torch.randn(2, CLASSES), torch.randn(3, CLASSES)
    assert released_class_distillation(student, teacher) is None
    assert released_class_distillation(student[:0], teacher) == 0
    one = released_class_distillation(student, teacher[:1])
    assert one is not None
    torch.testing.assert_close(one, class_divergence(student, teacher[:1].expand(2, -1)).mean())


def test_feature_distillation_is_optimised_unless_as_released() -> None:
    found, teacher, targets = _predictions(), _predictions(), _targets(1, 1)
    sizes = torch.tensor([[64, 96], [64, 96]])
    for released in (False, True):
        features = found.projected[0].clone().requires_grad_()
        loss = IncrementalCriterion(as_released=released).incremental(
            found._replace(projected=[features]), teacher, targets, sizes
        )
        if released:
            assert not loss.total.requires_grad  # nothing else depends on the features here
            assert "kd_errors" in loss.parts
        else:
            loss.total.backward()
            assert features.grad is not None
            assert features.grad.abs().sum() > 0
        assert loss.parts["loss_kd"] > 0


def test_the_teacher_is_frozen_and_without_dropout_unless_as_released() -> None:
    for released in (False, True):
        module = IncrementalDetrModule(_tiny(), IncrementalCriterion(), ADAMW, as_released=released)
        assert module.teacher is not None
        module.train()
        assert module.model.training
        assert module.teacher.training is released
        assert not any(parameter.requires_grad for parameter in module.teacher.parameters())


def test_without_distillation_there_is_no_teacher() -> None:
    criterion = IncrementalCriterion(feature_kd_coef=0.0, class_kd_coef=0.0)
    assert IncrementalDetrModule(_tiny(), criterion, ADAMW).teacher is None
    assert IncrementalDetrModule(_tiny(), IncrementalCriterion(), ADAMW, stage="base").teacher is None


def test_stages_hand_over_what_they_should() -> None:
    base = IncrementalDetrModule(_tiny(), IncrementalCriterion(), ADAMW, stage="base")
    torch.nn.init.normal_(_weight(base, "class_embed.0"))
    tuned = IncrementalDetrModule(
        _tiny(stage="self_supervised"), IncrementalCriterion(), ADAMW, stage="self_supervised"
    )
    fresh = _weight(tuned, "class_embed.0").clone()
    tuned.continue_from(base.state_dict())
    assert torch.equal(_weight(tuned, "class_embed.0"), fresh)
    assert torch.equal(_weight(tuned, "input_proj.0.0"), _weight(base, "input_proj.0.0"))
    novel = IncrementalDetrModule(_tiny(), IncrementalCriterion(), ADAMW)
    novel.continue_from(tuned.state_dict())
    assert torch.equal(_weight(novel, "class_embed.1"), fresh[:-1])
    assert novel.teacher is not None
    for ours, theirs in zip(novel.model.parameters(), novel.teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    directly = IncrementalDetrModule(_tiny(), IncrementalCriterion(), ADAMW)
    directly.continue_from(base.state_dict())
    assert torch.equal(_weight(directly, "class_embed.0"), _weight(base, "class_embed.0"))


def test_a_stage_of_another_size_is_a_clear_error() -> None:
    base = IncrementalDetrModule(_tiny(), IncrementalCriterion(), ADAMW, stage="base")
    with pytest.raises(CheckpointError, match="shapes differ"):
        IncrementalDetrModule(_tiny(dim_feedforward=16), IncrementalCriterion(), ADAMW).continue_from(base.state_dict())


def test_learning_rates() -> None:
    groups = parameter_groups(_tiny(), 1e-5, 2e-5)
    assert [group.get("lr") for group in groups] == [None, 1e-5, 2e-5]
    assert sum(len(group["params"]) for group in groups) == len(list(_tiny().parameters()))
    model = _tiny()
    model.train_only("projection_and_class_head")
    assert len(parameter_groups(model, 1e-5, 2e-5)) == 1


def test_official_weights_of_both_stages() -> None:
    tuned, novel = _tiny(stage="self_supervised"), _tiny()
    cut = import_weights(tuned.state_dict(), novel)
    assert torch.equal(cut["class_embed.0.weight"], tuned.state_dict()["class_embed.0.weight"][:-1])
    both = {}
    for name, value in novel.state_dict().items():
        first, _, rest = name.partition(".")
        both[name] = value
        if first != "query_embed":
            both[f"{first}_base.{rest}"] = value + 1
    assert torch.equal(import_weights(both, novel)["transformer.level_embed"], both["transformer.level_embed"])
    teacher = import_weights(both, novel, "base")
    assert torch.equal(teacher["transformer.level_embed"], both["transformer.level_embed"] + 1)
    assert torch.equal(teacher["query_embed.weight"], both["query_embed.weight"])
    with pytest.raises(CheckpointError, match="lacks keys"):
        import_weights({}, novel)


def test_whole_checkpoints_of_every_stage_are_imported(tmp_path: Path) -> None:
    model = recipe_model("incremental_detr/small")
    wanted = model.state_dict()
    base = save_checkpoint(tmp_path / "checkpoint_base.pth", model, model=wanted)
    assert_equal(imported("incremental_detr/small", base), wanted)
    pseudo = {
        name: torch.cat([value, value[:1]]) if name.startswith("class_embed.") else value
        for name, value in wanted.items()
    }
    tuned = save_checkpoint(tmp_path / "checkpoint_base_finetuned.pth", model, model=pseudo)
    assert_equal(imported("incremental_detr/small", tuned), wanted)
    teacher = {name.replace(".", "_base.", 1): value + 1 for name, value in wanted.items() if "query_embed" not in name}
    novel = save_checkpoint(tmp_path / "checkpoint.pth", model, model=wanted | teacher)
    assert_equal(imported("incremental_detr/small", novel), wanted)


def test_golden_cases_of_every_kind_have_an_adapter(goldens: Path) -> None:
    kinds = {load_case(path).case.kind for path in find_cases(goldens / "incremental_detr")}
    assert kinds == ADAPTERS.keys()
