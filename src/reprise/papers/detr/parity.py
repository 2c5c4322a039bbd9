"""Golden cases of the official code, by kind; names follow the cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reprise.golden import Adapter, GoldenCase, clip_gradients, gradient_of
from reprise.nn.backbone import ResNetBackbone
from reprise.nn.boxes import cxcywh_to_xyxy, pairwise_giou, pairwise_iou, xyxy_to_cxcywh
from reprise.nn.detection import pad_images, set_detections
from reprise.nn.golden_detection import gradients_of, images_of, losses_of, targets_of
from reprise.nn.matching import match, matching_cost, pad_targets
from reprise.nn.position import LearnedPosition2d, sine_position_2d
from reprise.papers.detr.criterion import SetCriterion, dice_loss, focal_loss
from reprise.papers.detr.model import DETR, DetrOutput
from reprise.papers.detr.module import parameter_groups
from reprise.papers.detr.segmentation import DETRSegmentation, instance_masks
from reprise.papers.detr.transformer import Transformer
from reprise.papers.detr.weights import import_weights
from reprise.training.schedules import step as step_schedule

Tensors = dict[str, Tensor]


def box_ops(case: GoldenCase) -> Tensors:
    a = case.inputs["a"].clone().requires_grad_()
    a_xyxy, b_xyxy = cxcywh_to_xyxy(a), cxcywh_to_xyxy(case.inputs["b"])
    iou, giou = pairwise_iou(a_xyxy, b_xyxy), pairwise_giou(a_xyxy, b_xyxy)
    (case.inputs["coef"] * giou).sum().backward()
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(1) for box in (a_xyxy, b_xyxy))
    union = ((area_a[:, None] + area_b) / (1 + iou)).nan_to_num(0)  # IoU = intersection / union; 0 / 0 of two points
    values = {"a_xyxy": a_xyxy, "iou": iou, "union": union, "giou": giou, "a_back": xyxy_to_cxcywh(a_xyxy)}
    return {name: value.detach() for name, value in values.items()} | {"grad_a": gradient_of(a)}


def mask_losses(case: GoldenCase) -> Tensors:
    num_boxes = case.config["num_boxes"]
    losses: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
        "dice": dice_loss,
        "focal": focal_loss,
        "focal_alt": partial(focal_loss, alpha=case.config["alpha"], gamma=case.config["gamma"]),
    }
    outputs: Tensors = {}
    for name, loss in losses.items():
        logits = case.inputs["logits"].clone().requires_grad_()
        outputs[name] = loss(logits, case.inputs["targets"].float(), num_boxes)
        outputs[name].backward()
        outputs[f"grad_{name}"] = gradient_of(logits)
    return {name: value.detach() for name, value in outputs.items()}


def matcher(case: GoldenCase) -> Tensors:
    config = case.config
    targets = pad_targets(targets_of(case, len(config["target_counts"])))
    cost = matching_cost(
        case.inputs["logits"].softmax(-1),
        case.inputs["boxes"],
        targets,
        class_weight=config["set_cost_class"],
        l1_weight=config["set_cost_bbox"],
        giou_weight=config["set_cost_giou"],
    )
    matches = match(cost[None], targets.counts)
    outputs: Tensors = {}
    for image, count in enumerate(targets.counts):
        outputs[f"src{image}"], outputs[f"tgt{image}"] = matches.of(0, image)
        outputs[f"cost{image}"] = cost[image, :, :count]
    return outputs


def position_encoding(case: GoldenCase) -> Tensors:
    mask = case.inputs["mask"].bool()
    sines = {f"sine{index}": _sine(mask, **options) for index, options in enumerate(case.config["sine"])}
    learned = LearnedPosition2d(
        case.config["learned_feats"], max_size=max(len(value) for value in case.weights.values())
    )
    learned.load_state_dict(dict(case.weights))
    return sines | {"learned": learned(mask).detach()}


def _sine(
    mask: Tensor, num_pos_feats: int, temperature: float = 10000, normalize: bool = False, scale: float | None = None
) -> Tensor:
    """The official constructor's arguments and defaults."""
    kwargs = {} if scale is None else {"scale": scale}
    return sine_position_2d(mask, num_pos_feats, temperature=temperature, normalize=normalize, **kwargs)


def postprocess(case: GoldenCase) -> Tensors:
    found = set_detections(case.inputs["logits"], case.inputs["boxes"], case.inputs["sizes"])
    return {f"{name}{image}": value for image, one in enumerate(found) for name, value in one.items()}


def criterion(case: GoldenCase) -> Tensors:
    logits, boxes = (case.inputs[name].clone().requires_grad_() for name in ("logits", "boxes"))
    loss_function = _criterion(case.config)
    loss = loss_function(logits, boxes, targets_of(case, logits.shape[1]))
    loss.total.backward()
    gradients = {"grad_logits": gradient_of(logits), "grad_boxes": gradient_of(boxes)}
    return losses_of(loss) | gradients | {"empty_weight": loss_function.class_weight}


def model(case: GoldenCase) -> Tensors:
    detector = build_detr(case.config)
    detector.load_state_dict(import_weights(case.weights, detector))
    detector.eval()
    image, mask = pad_images(images_of(case))
    output = detector(image, mask)
    targets = targets_of(case, len(image))
    loss_function = _criterion(case.config)
    loss = loss_function(output.logits, output.boxes, targets)
    loss.total.backward()
    outputs = _detector_outputs(case, image, output, loss_function, targets)
    return outputs | losses_of(loss) | gradients_of(case, detector)


def segmentation(case: GoldenCase) -> Tensors:
    network = DETRSegmentation(build_detr(case.config))
    network.load_state_dict(import_weights(case.weights, network))
    network.eval()
    images = images_of(case)
    image, mask = pad_images(images)
    output, masks, attention = network(image, mask)
    targets = targets_of(case, len(image))
    loss_function = _criterion(case.config)
    loss = loss_function(output.logits, output.boxes, targets, masks)
    loss.total.backward()
    sizes = torch.tensor([one.shape[-2:] for one in images])
    threshold = case.config["mask_threshold"]
    binary = instance_masks(masks.detach(), sizes, torch.tensor(case.config["orig_sizes"]), threshold=threshold)
    return (
        _detector_outputs(case, image, output, loss_function, targets)
        | losses_of(loss)
        | gradients_of(case, network)
        | {"pred_masks": masks.detach(), "bbox_attention": attention.detach()}
        | {f"det{index}_masks": one.unsqueeze(1).to(torch.uint8) for index, one in enumerate(binary)}
    )


def train_steps(case: GoldenCase) -> Tensors:
    config = case.config
    detector = build_detr(config)
    detector.load_state_dict(import_weights(case.weights, detector))
    detector.train()
    loss_function = _criterion(config)
    groups = parameter_groups(detector, config["lr_backbone"])
    optimizer = torch.optim.AdamW(groups, lr=config["lr"], weight_decay=config["weight_decay"])
    drops = list(range(config["lr_drop"], config["steps"] + 1, config["lr_drop"]))
    schedule = step_schedule(optimizer, milestones=drops)
    outputs: Tensors = {}
    for number in range(config["steps"]):
        image, mask = pad_images(images_of(case, f"step{number}_"))
        output = detector(image, mask)
        loss = loss_function(output.logits, output.boxes, targets_of(case, len(image), f"step{number}_")).total
        optimizer.zero_grad()
        loss.backward()
        norm = clip_gradients(detector.parameters(), config["clip_max_norm"])
        outputs[f"loss_step{number}"] = loss.detach()
        outputs[f"lr_step{number}"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
        outputs[f"gradnorm_step{number}"] = norm
        optimizer.step()
        schedule.step()
        if number in config["record_steps"]:
            state = detector.state_dict()
            outputs |= {f"step{number}/{name}": state[name].clone() for name in config["record"]}
    return outputs


def build_detr(config: Mapping[str, Any]) -> DETR:
    """A detector from official argument names."""
    body = config["backbone"]
    backbone = ResNetBackbone(
        None,
        block=body["block"],
        layers=body["layers"],
        width=body["base"],
        dilation=body["dilation"],
        train_backbone=body["train_backbone"],
    )
    transformer = Transformer(
        config["hidden_dim"],
        num_heads=config["nheads"],
        encoder_layers=config["enc_layers"],
        decoder_layers=config["dec_layers"],
        dim_feedforward=config["dim_feedforward"],
        dropout=config["dropout"],
        pre_norm=config["pre_norm"],
    )
    return DETR(
        backbone,
        transformer,
        num_classes=config["num_classes"],
        num_queries=config["num_queries"],
        position="learned" if config["position_embedding"] in ("learned", "v3") else "sine",
    )


def _criterion(config: Mapping[str, Any]) -> SetCriterion:
    return SetCriterion(
        config["num_classes"],
        class_cost=config["set_cost_class"],
        l1_cost=config["set_cost_bbox"],
        giou_cost=config["set_cost_giou"],
        l1_coef=config["bbox_loss_coef"],
        giou_coef=config["giou_loss_coef"],
        mask_coef=config.get("mask_loss_coef", 1.0),
        dice_coef=config.get("dice_loss_coef", 1.0),
        eos_coef=config["eos_coef"],
        aux_loss=config["aux_loss"],
        as_released=True,
    )


def _detector_outputs(
    case: GoldenCase,
    image: Tensor,
    output: DetrOutput,
    loss_function: SetCriterion,
    targets: Sequence[Mapping[str, Tensor]],
) -> Tensors:
    assert output.padding is not None
    values = {
        "padded_shape": torch.tensor(image.shape),
        "feat_mask": output.padding.to(torch.uint8),
        "feat": output.features[-1],
        "pos": output.position,
        "hs": output.hidden,
        "memory": output.memory,
        "logits": output.logits,
        "boxes": output.boxes,
    }
    matches = loss_function.match(output.logits[-1:], output.boxes[-1:], pad_targets(targets))
    sizes = torch.tensor(case.config["orig_sizes"])
    for index, found in enumerate(set_detections(output.logits[-1], output.boxes[-1], sizes)):
        values[f"match{index}_src"], values[f"match{index}_tgt"] = matches.of(0, index)
        values |= {f"det{index}_{name}": value for name, value in found.items()}
    return {name: value.detach() for name, value in values.items()}


ADAPTERS: dict[str, Adapter] = {
    "detr_box_ops": box_ops,
    "detr_criterion": criterion,
    "detr_mask_losses": mask_losses,
    "detr_matcher": matcher,
    "detr_model": model,
    "detr_pos_encoding": position_encoding,
    "detr_postprocess": postprocess,
    "detr_segm": segmentation,
    "detr_train_steps": train_steps,
}
