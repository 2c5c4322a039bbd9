"""Golden cases of the official code, by kind; names follow the cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reprise.golden import Adapter, GoldenCase, clip_gradients, gradient_of
from reprise.nn.deformable import DeformableAttention, compass, deformable_attention
from reprise.nn.detection import pad_images, top_detections
from reprise.nn.golden_detection import gradients_of, images_of, losses_of, targets_of
from reprise.nn.matching import PaddedTargets, matching_cost, pad_targets
from reprise.nn.position import sine_position_2d
from reprise.nn.set_loss import SetLoss
from reprise.papers.incremental_detr.criterion import (
    IncrementalCriterion,
    Predictions,
    focal_class_score,
    kept_proposals,
    predictions,
)
from reprise.papers.incremental_detr.distillation import (
    class_divergence,
    covered_cells,
    feature_distillation,
    released_class_distillation,
    released_distilled_cells,
    released_feature_distillation,
)
from reprise.papers.incremental_detr.model import DeformableDETR
from reprise.papers.incremental_detr.official import criterion_of, detector_of
from reprise.papers.incremental_detr.weights import Branch, import_weights

Tensors = dict[str, Tensor]
Targets = list[dict[str, Tensor]]
BRANCHES: tuple[Branch, Branch] = ("novel", "base")  # of a stage-2 file


def deformable_core(case: GoldenCase) -> Tensors:
    leaves = {name: case.inputs[name].clone().requires_grad_() for name in ("value", "locations", "weights")}
    out = deformable_attention(leaves["value"], _shapes(case), leaves["locations"], leaves["weights"])
    (case.inputs["coef"] * out).sum().backward()
    return {"out": out.detach()} | {f"grad_{name}": gradient_of(leaf) for name, leaf in leaves.items()}


def deformable_module(case: GoldenCase) -> Tensors:
    config, shapes = case.config, _shapes(case)
    sizes = {"levels": len(shapes), "heads": config["heads"], "points": config["points"]}
    attention = DeformableAttention(config["d_model"], **sizes)
    outputs = {"init_sampling_offsets_bias": compass(config["heads"], len(shapes), config["points"]).flatten()}
    attention.load_state_dict(dict(case.weights))
    padding = case.inputs["mask"].bool() if "mask" in case.inputs else None
    for name in ("ref2", "ref4"):
        attention.zero_grad()
        query, memory = (case.inputs[key].clone().requires_grad_() for key in ("query", "input"))
        out = attention(query, case.inputs[name], memory, shapes, padding)
        (case.inputs["coef"] * out).sum().backward()
        gradients = {"query": query, "input": memory, **dict(attention.named_parameters())}
        outputs[f"{name}/out"] = out.detach()
        outputs |= {f"{name}/grad_{key}": gradient_of(leaf) for key, leaf in gradients.items()}
    return outputs


def matcher(case: GoldenCase) -> Tensors:
    targets = pad_targets(targets_of(case, len(case.config["target_counts"])))
    loss_function = criterion_of(case.config)
    logits, boxes = case.inputs["logits"], case.inputs["boxes"]
    cost = matching_cost(focal_class_score(logits), boxes, targets, **loss_function.costs)
    matches = loss_function.match(logits[None], boxes[None], targets)
    outputs: Tensors = {}
    for image, count in enumerate(targets.counts):
        outputs[f"src{image}"], outputs[f"tgt{image}"] = matches.of(0, image)
        outputs[f"cost{image}"] = cost[image, :, :count]
    return outputs


def position_encoding(case: GoldenCase) -> Tensors:
    mask = case.inputs["mask"].bool()
    return {
        f"sine{index}": sine_position_2d(
            mask,
            options.get("num_pos_feats", 64),
            temperature=options.get("temperature", 10000.0),
            normalize=options.get("normalize", False),
            shift=0.5,
            **({"scale": options["scale"]} if options.get("scale") is not None else {}),
        )
        for index, options in enumerate(case.config["sine"])
    }


def postprocess(case: GoldenCase) -> Tensors:
    found = top_detections(case.inputs["logits"], case.inputs["boxes"], case.inputs["sizes"])
    return {f"{name}{image}": value for image, one in enumerate(found) for name, value in one.items()}


def base_criterion(case: GoldenCase) -> Tensors:
    logits, boxes = (case.inputs[name].clone().requires_grad_() for name in ("logits", "boxes"))
    outputs, loss = _stage_1(case, logits, boxes)
    loss.total.backward()
    return (
        outputs | {"grad_logits": gradient_of(logits), "grad_boxes": gradient_of(boxes)} | _matched(case, logits, boxes)
    )


def base_model(case: GoldenCase) -> Tensors:
    detector = detector_of(case.config, case.config["num_classes"] + 1)
    detector.load_state_dict(import_weights(case.weights, detector))
    detector.eval()
    output = detector(*pad_images(images_of(case)))
    outputs, loss = _stage_1(case, output.logits, output.boxes)
    loss.total.backward()
    made = output.transformer
    values = {
        "valid_ratios": made.valid_ratios,
        "memory": made.memory,
        "hs": made.hidden,
        "init_reference": made.init_reference,
        "inter_references": made.references,
        "logits": output.logits,
        "boxes": output.boxes,
    }
    for level, parts in enumerate(zip(output.projected, output.paddings, output.positions, strict=True)):
        values[f"src{level}"], values[f"mask{level}"], values[f"pos{level}"] = parts
    values = {name: value.detach() for name, value in values.items()}
    values |= {name: value.to(torch.uint8) for name, value in values.items() if name.startswith("mask")}
    return values | outputs | gradients_of(case, detector)


def _stage_1(case: GoldenCase, logits: Tensor, boxes: Tensor) -> tuple[Tensors, SetLoss]:
    targets, proposals = _annotations_and_proposals(case, logits.shape[1])
    found = Predictions(logits, boxes, (), ())
    loss = criterion_of(case.config).self_supervised(found, targets, proposals, logits.shape[-1] - 1)
    return losses_of(loss), loss


def _matched(case: GoldenCase, logits: Tensor, boxes: Tensor) -> Tensors:
    """Kept proposals and both matchings of the last layer."""
    loss_function = criterion_of(case.config)
    targets, proposals = _annotations_and_proposals(case, logits.shape[1])
    known = pad_targets(targets)
    kept = kept_proposals(proposals, known, loss_function.overlap)
    label = logits.shape[-1] - 1
    pseudo = pad_targets([{"boxes": box, "labels": torch.full((len(box),), label)} for box in kept])
    outputs = {f"kept{image}_boxes": box for image, box in enumerate(kept)}
    for name, objects in (("match", known), ("select", pseudo)):
        matches = loss_function.match(logits[-1:].detach(), boxes[-1:].detach(), objects)
        for image in range(len(kept)):
            outputs[f"{name}{image}_src"], outputs[f"{name}{image}_tgt"] = matches.of(0, image)
    return outputs


def feature_kd_released(case: GoldenCase) -> Tensors:
    features, teacher = (case.inputs[name].clone().requires_grad_() for name in ("srcs", "srcs_base"))
    size = features.shape[-2:]
    boxes = [case.inputs[f"tgt{image}_boxes"] for image in range(len(features))]
    pairs = zip(boxes, case.config["image_sizes"], strict=True)
    cells = torch.stack([released_distilled_cells(box, image, size) for box, image in pairs])
    return _feature_kd_outputs(released_feature_distillation(features, teacher, cells), features, teacher, cells)


def feature_kd_intended(case: GoldenCase) -> Tensors:
    features, teacher = (case.inputs[name].clone().requires_grad_() for name in ("srcs", "srcs_base"))
    boxes = case.inputs["boxes_distinct"]
    height, width = features.shape[-2:]
    free = covered_cells(boxes[None], [len(boxes)], torch.tensor([[float(width), float(height)]]), (height, width))
    return _feature_kd_outputs(feature_distillation(features, teacher, free), features, teacher, ~free)


def _feature_kd_outputs(loss: Tensor, features: Tensor, teacher: Tensor, distilled: Tensor) -> Tensors:
    loss.backward()
    outputs = {"loss_kd": loss.detach(), "grad_srcs": gradient_of(features), "grad_srcs_base": gradient_of(teacher)}
    return outputs | {f"mask{image}": cells.to(torch.uint8) for image, cells in enumerate(distilled)}


def class_kd(case: GoldenCase) -> Tensors:
    outputs: Tensors = {}
    for index, scenario in enumerate(case.config["scenarios"]):
        prefix = f"s{index}_"
        targets = pad_targets(targets_of(case, len(scenario["target_counts"]), prefix))
        found = _class_kd_scenario(case, prefix, targets)
        outputs |= {f"{prefix}{name}": value for name, value in found.items()}
    return outputs


def _class_kd_scenario(case: GoldenCase, prefix: str, targets: PaddedTargets) -> Tensors:
    loss_function = criterion_of(case.config)
    boxes, teacher, teacher_boxes = (case.inputs[f"{prefix}{name}"] for name in ("boxes", "logits_base", "boxes_base"))
    logits = case.inputs[f"{prefix}logits"]
    pseudo, queries = loss_function.pseudo_targets(teacher, teacher_boxes, targets)
    matches = loss_function.match(logits[None], boxes[None], pseudo)
    novel = loss_function.match(logits[None], boxes[None], targets)
    outputs: Tensors = {}
    for image, count in enumerate(pseudo.counts):
        outputs[f"pseudo{image}_labels"] = pseudo.labels[image, :count]
        outputs[f"pseudo{image}_boxes"] = pseudo.boxes[image, :count]
        outputs[f"pseudo{image}_query"] = queries[image]
        outputs[f"base{image}_src"], outputs[f"base{image}_tgt"] = matches.of(0, image)
        outputs[f"match{image}_src"], outputs[f"match{image}_tgt"] = novel.of(0, image)
    matched_teacher = teacher[matches.image, matches.query]

    def released(x: Tensor) -> Tensor | None:
        return released_class_distillation(x[novel.image, novel.query], matched_teacher)

    def intended(x: Tensor) -> Tensor:
        rows = class_divergence(x[matches.image, matches.query], matched_teacher)
        return rows.sum() / max(len(rows), 1)

    def producer(x: Tensor) -> Tensor:
        return loss_function.class_kd(x[None], boxes[None], teacher[None], teacher_boxes[None], targets).squeeze(0)

    names = {"loss_cls_kd": "grad_logits", "loss_intended": "grad_intended", "loss_producer": "grad_producer"}
    for (loss_name, gradient), loss in zip(names.items(), (released, intended, producer), strict=True):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        if value is None:  # the released code stops with a shape error here, and so has no value to compare with
            continue
        value.backward()
        outputs |= {loss_name: value.detach(), gradient: gradient_of(leaf)}
    return outputs


def incremental_criterion(case: GoldenCase) -> Tensors:
    names = ("logits", "boxes", "srcs")
    leaves = {name: case.inputs[name].clone().requires_grad_() for name in names}
    sizes = torch.tensor(case.config["image_sizes"])
    padding = torch.zeros(len(sizes), *leaves["srcs"].shape[-2:], dtype=torch.bool)
    found = Predictions(leaves["logits"], leaves["boxes"], [leaves["srcs"]], [padding])
    logits, boxes, features = (case.inputs[f"{name}_base"] for name in names)
    teacher = Predictions(logits, boxes, [features], [padding])
    targets = targets_of(case, len(sizes))
    loss_function = criterion_of(case.config)
    loss = loss_function.incremental(found, teacher, targets, sizes)
    loss.total.backward()
    gradients = {f"grad_{name}": gradient_of(leaf) for name, leaf in leaves.items()}
    return losses_of(loss) | gradients | _pseudo(loss_function, teacher, targets)


def incremental_model(case: GoldenCase) -> Tensors:
    detector, teacher = _two_branches(case)
    detector.eval()
    sizes = torch.tensor(case.config["image_sizes"])
    image, mask = pad_images(images_of(case))
    output = detector(image, mask)
    with torch.no_grad():
        base = teacher(image, mask)
    targets = targets_of(case, len(image))
    loss_function = criterion_of(case.config)
    loss = loss_function.incremental(predictions(output), predictions(base), targets, sizes)
    parameters = dict(detector.named_parameters())
    names = [name for name in case.config["grads"] if name.startswith("input_proj")]
    alone = torch.autograd.grad(
        loss.parts["loss_kd"],
        [parameters[name] for name in names],
        retain_graph=True,
        allow_unused=True,  # the loss looks at the first level alone
        materialize_grads=True,
    )
    loss.total.backward()
    values = {"srcs": output.projected[0], "logits": output.logits, "boxes": output.boxes}
    values |= {"srcs_base": base.projected[0], "logits_base": base.logits, "boxes_base": base.boxes}
    return (
        {name: value.detach() for name, value in values.items()}
        | losses_of(loss)
        | gradients_of(case, detector)
        | {f"grad_loss_kd_only_{name}": value for name, value in zip(names, alone, strict=True)}
        | _pseudo(loss_function, predictions(base), targets)
    )


def train_steps(case: GoldenCase) -> Tensors:
    config = case.config
    detector, teacher = _two_branches(case)
    detector.train_only("projection_and_class_head")
    detector.train()
    loss_function = criterion_of(config)
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["lr"], weight_decay=config["weight_decay"])
    sizes = torch.tensor(config["image_sizes"])
    outputs: Tensors = {}
    for number in range(config["steps"]):
        image, mask = pad_images(images_of(case, f"step{number}_"))
        with torch.no_grad():
            base = predictions(teacher(image, mask))
        targets = targets_of(case, len(image), f"step{number}_")
        loss = loss_function.incremental(predictions(detector(image, mask)), base, targets, sizes)
        optimizer.zero_grad()
        loss.total.backward()
        outputs[f"gradnorm_step{number}"] = clip_gradients(trained, config["clip_max_norm"])
        optimizer.step()
        outputs[f"loss_step{number}"] = loss.total.detach()
        outputs |= {f"{name}_step{number}": loss.parts[name].detach() for name in ("loss_cls_kd", "loss_kd")}
        state = detector.state_dict()
        outputs |= {f"step{number}/{name}": state[name].clone() for name in config["record"]}
    return outputs


def weight_transfer(case: GoldenCase) -> Tensors:
    outputs: Tensors = {}
    for branch, suffix in zip(BRANCHES, ("", "_base"), strict=True):
        detector = _branch(case, branch)
        with torch.no_grad():
            output = detector.eval()(*pad_images(images_of(case)))
        outputs |= {f"logits{suffix}": output.logits[-1], f"boxes{suffix}": output.boxes[-1]}
        outputs[f"srcs{suffix}"] = output.projected[0]
    return outputs


def _two_branches(case: GoldenCase) -> tuple[DeformableDETR, DeformableDETR]:
    """Novel model and teacher of a stage-2 case; the teacher in evaluation mode."""
    novel, base = (_branch(case, branch) for branch in BRANCHES)
    return novel, base.eval()


def _branch(case: GoldenCase, branch: Branch) -> DeformableDETR:
    """One network of a stage-2 case.

    The released teacher never refines its boxes, though its heads are then separate: its decoder looks for them under
    another name than they are given.
    """
    detector = detector_of(case.config, case.config["num_classes"])
    if branch == "base":
        detector.transformer.decoder.bbox_embed = None
    detector.load_state_dict(import_weights(case.weights, detector, branch))
    return detector


def _shapes(case: GoldenCase) -> list[tuple[int, int]]:
    return [(height, width) for height, width in case.config["spatial_shapes"]]


def _annotations_and_proposals(case: GoldenCase, count: int) -> tuple[Targets, list[Tensor]]:
    """The first `target_counts` targets of each image are annotations, the rest proposals."""
    rows = list(zip(targets_of(case, count), case.config["target_counts"], strict=True))
    known = [{name: value[:real] for name, value in target.items()} for target, real in rows]
    return known, [target["boxes"][real:] for target, real in rows]


def _pseudo(loss_function: IncrementalCriterion, teacher: Predictions, targets: Sequence[dict[str, Tensor]]) -> Tensors:
    """Pseudo targets of the last layer."""
    found, _ = loss_function.pseudo_targets(teacher.logits[-1], teacher.boxes[-1], pad_targets(targets))
    outputs: Tensors = {}
    for image, count in enumerate(found.counts):
        outputs[f"pseudo{image}_labels"] = found.labels[image, :count]
        outputs[f"pseudo{image}_boxes"] = found.boxes[image, :count].detach()
    return outputs


ADAPTERS: dict[str, Adapter] = {
    "msda_core": deformable_core,
    "msda_module": deformable_module,
    "incdetr_matcher": matcher,
    "incdetr_pos_encoding": position_encoding,
    "incdetr_postprocess": postprocess,
    "incdetr_base_criterion": base_criterion,
    "incdetr_base_model": base_model,
    "incdetr_feature_kd_released": feature_kd_released,
    "incdetr_feature_kd_intended": feature_kd_intended,
    "incdetr_class_kd": class_kd,
    "incdetr_criterion": incremental_criterion,
    "incdetr_inc_model": incremental_model,
    "incdetr_train_steps": train_steps,
    "incdetr_weight_transfer": weight_transfer,
}
