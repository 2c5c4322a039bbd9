"""Adapters for the golden cases of HL-hanlin/SMKD, by kind; names follow the cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reprise.golden import Adapter, GoldenCase
from reprise.nn.masks import MaskSampler
from reprise.papers.smkd.criterion import prototype_cross_entropy
from reprise.papers.smkd.distillation import Distillation, Objective, Temperatures, Views
from reprise.papers.smkd.model import (
    DistillationNetwork,
    Projected,
    ProjectionHead,
    VisionTransformer,
    follow,
    patch_weights,
    pooled_features,
)
from reprise.papers.smkd.steps import prepare_gradients, view_outputs
from reprise.papers.smkd.weights import import_weights
from reprise.training.episodes import prototype_logits
from reprise.training.scheduled import decay_groups, set_weight_decay, warmup_cosine_value

Tensors = dict[str, Tensor]
Config = Mapping[str, Any]


def build_backbone(config: Config, channels: int) -> VisionTransformer:
    vit = config["vit"]
    return VisionTransformer(
        vit["img_size"],
        vit["patch"],
        channels=channels,
        width=vit["embed_dim"],
        depth=vit["depth"],
        num_heads=vit["heads"],
        mlp_ratio=vit.get("mlp_ratio", 4),
    )


def build_network(case: GoldenCase, part: str) -> DistillationNetwork:
    """The student or the teacher of a case, with its weights."""
    head, width = case.config["head"], case.config["vit"]["embed_dim"]
    weights = {key.removeprefix(f"{part}."): value for key, value in case.weights.items() if key.startswith(f"{part}.")}
    shared = head.get("shared_head", True)
    network = DistillationNetwork(
        build_backbone(case.config, weights["backbone.patch_embed.proj.weight"].shape[1]),
        ProjectionHead(
            width,
            prototypes=head["out_dim"],
            patch_prototypes=head.get("patch_out_dim", head["out_dim"]),
            hidden=head.get("hidden_dim", 2048),
            bottleneck=head.get("bottleneck_dim", 256),
            layers=head.get("nlayers", 3),
            shared=shared if part == "student" else head.get("shared_head_teacher", shared),
            train_prototype_norm=not head.get("norm_last_layer", True),
        ),
    )
    network.load_state_dict(import_weights(weights, network))
    return network


def collected(inputs: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The inputs `name0`, `name1`, ... in order."""
    keys = [key for key in inputs if key.startswith(name) and key.removeprefix(name).isdigit()]
    return [inputs[key] for key in sorted(keys, key=lambda key: int(key.removeprefix(name)))]


def masks_of(config: Config, inputs: Mapping[str, Tensor]) -> Tensor | None:
    masks = collected(inputs, "mask")
    return torch.cat(masks).bool() if masks and config.get("use_masked_im_modeling", True) else None


@torch.no_grad()
def forward(case: GoldenCase) -> Tensors:
    student, teacher = build_network(case, "student"), build_network(case, "teacher")
    image = torch.cat(collected(case.inputs, "global"))
    outputs: Tensors = {}
    for name, network, mask in (("teacher", teacher, None), ("student", student, masks_of(case.config, case.inputs))):
        tokens, attention = network.backbone.with_attention(image, mask)
        outputs |= {f"{name}/{key}": value for key, value in _named(network.project(tokens)).items()}
        outputs[f"{name}/attn"] = attention
    if local := collected(case.inputs, "local"):
        outputs |= {f"student_local/{key}": value for key, value in _named(student(torch.cat(local))).items()}
    return outputs


def _named(output: Projected) -> Tensors:
    assert output.patch is not None
    return {"tokens": output.tokens, "cls": output.cls, "patch": output.patch}


def objective_of(config: Config) -> Objective:
    """The released objective; `patch_match: paper` changes the matching alone."""
    objective = Objective(
        supervised=config["supervised_contrastive"],
        cls_weight=config["lambda1"],
        patch_weight=config["lambda2"],
        mim_weight=config["lambda3"],
        attention_weighted=config["weighted_pool"],
        center_momentum=config.get("center_momentum", 0.9),
    ).released()
    return replace(objective, patch_match="cosine") if config.get("patch_match") == "paper" else objective


def temperatures_of(config: Config) -> Temperatures:
    return Temperatures(
        warmup=config["warmup_teacher_temp"],
        final=config["teacher_temp"],
        warmup_epochs=config["warmup_teacher_temp_epochs"],
        patch_warmup=config["warmup_teacher_patch_temp"],
        patch_final=config["teacher_patch_temp"],
        patch_delay=config.get("mim_start_epoch", 0),
        student=config.get("student_temp", 0.1),
    )


def loss(case: GoldenCase) -> Tensors:
    config = case.config
    distillation = Distillation(
        config["out_dim"], config["patch_out_dim"], objective_of(config), temperatures_of(config)
    )
    distillation.center.copy_(case.inputs["center"])
    distillation.patch_center.copy_(case.inputs["center2"])
    outputs: Tensors = {}
    for number, epoch in enumerate(config["call_epochs"]):
        prefix = f"call{number}/"
        inputs = {key.removeprefix(prefix): value for key, value in case.inputs.items() if key.startswith(prefix)}
        found = _loss_call(distillation, inputs, config, epoch)
        outputs |= {prefix + key: value for key, value in found.items()}
    return outputs


def _loss_call(distillation: Distillation, inputs: Mapping[str, Tensor], config: Config, epoch: int) -> Tensors:
    names = [name for name in ("student_cls", "student_patch", "student_local_cls") if name in inputs]
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    nothing = torch.empty(2 * config["batch"], 1 + config["grid"] ** 2, config["embed_dim"])
    local = leaves.get("student_local_cls")
    mask, attention = collected(inputs, "mask"), inputs.get("teacher_attn")
    views = Views(
        Projected(inputs.get("teacher_tokens", nothing), inputs["teacher_cls"], inputs["teacher_patch"]),
        Projected(inputs.get("student_tokens", nothing), leaves["student_cls"], leaves["student_patch"]),
        [] if local is None or not len(local) else list(local.chunk(config["local_crops"])),
        torch.cat(mask).bool().flatten(1) if mask else None,
        None if attention is None else patch_weights(attention),
    )
    label = inputs.get("labels", torch.arange(config["batch"]))
    parts = distillation(views, label, epoch)
    gradients = torch.autograd.grad(parts.total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    found = {"cls_loss": parts.cls, "patch_loss": parts.patch, "mim_loss": parts.mim, "loss": parts.total}
    found |= {f"grad_{name}": value for name, value in zip(leaves, gradients, strict=True)}
    found |= {"center_after": distillation.center.clone(), "center2_after": distillation.patch_center.clone()}
    return {name: value.detach() for name, value in found.items()}


@torch.no_grad()
def few_shot_eval(case: GoldenCase) -> Tensors:
    config, image = case.config, case.inputs["images"]
    backbone = build_backbone(config, image.shape[1])
    backbone.load_state_dict(import_weights(case.weights, backbone))
    tokens, attention = backbone.with_attention(image)
    outputs: Tensors = {}
    for number, option in enumerate(config["options"]):
        feature = pooled_features(
            tokens,
            attention,
            cls=option["cls_tokens"],
            average=option["avgpool_patchtokens"],
            weighted=option["weighted_avgpool_patchtokens"],
        )
        logits = prototype_logits(feature, case.inputs["episode"][None], config["shots"])[0]
        outputs |= {f"features{number}": feature, f"cos{number}": logits.t(), f"pred{number}": logits.argmax(-1)}
    return outputs


def masks(case: GoldenCase) -> Tensors:
    outputs: Tensors = {}
    for number, setting in enumerate(case.config["settings"]):
        height, width = (side // setting["patch"] for side in setting["image_hw"])
        sampler = MaskSampler(
            setting["pred_ratio"],
            setting["pred_ratio_var"],
            "random" if setting["shape"] == "rand" else setting["shape"],
            setting.get("pred_aspect_ratio", [0.3])[0],
        )
        outputs[f"masks{number}"] = sampler.sample(setting["crops"], height, width, setting["seed"]).to(torch.uint8)
    return outputs


def schedules(case: GoldenCase) -> Tensors:
    outputs: Tensors = {}
    for number, setting in enumerate(case.config["cosine"]):
        values = _cosine(setting)
        outputs[f"cosine{number}"] = torch.tensor(values, dtype=torch.float64)
    for number, setting in enumerate(case.config["temps"]):
        temperatures = temperatures_of(setting)
        epochs = range(setting["epochs"])
        rows = [[temperatures.cls(epoch) for epoch in epochs], [temperatures.patch(epoch) for epoch in epochs]]
        outputs[f"temp{number}"] = torch.tensor(rows, dtype=torch.float64)
    return outputs


def _cosine(setting: Config) -> list[float]:
    steps, per_epoch = setting["epochs"] * setting["niter_per_ep"], setting["niter_per_ep"]
    warmup, start = setting.get("warmup_epochs", 0) * per_epoch, setting.get("start_warmup_value", 0.0)
    base, final = setting["base_value"], setting["final_value"]
    return [warmup_cosine_value(step, steps, base, final, warmup, start) for step in range(steps)]


def ce_loss(case: GoldenCase) -> Tensors:
    linear = nn.Linear(case.config["in_dim"], case.config["nclasses"])
    linear.load_state_dict({key.removeprefix("linear."): value for key, value in case.weights.items()})
    student = case.inputs["student_cls"].clone().requires_grad_()
    value = prototype_cross_entropy(linear(student), case.inputs["labels"], as_released=True)
    weight, bias, inputs = torch.autograd.grad(value, [linear.weight, linear.bias, student])
    gradients = {"grad_linear.weight": weight, "grad_linear.bias": bias, "grad_student_cls": inputs}
    return {"loss": value.detach(), **gradients}


class TrainingLoop:
    """The official iterations, one an epoch, of our networks and our objective."""

    def __init__(self, case: GoldenCase) -> None:
        self.case, self.config = case, case.config
        self.student, self.teacher = build_network(case, "student"), build_network(case, "teacher")
        self.teacher.requires_grad_(False)
        head = self.config["head"]
        self.distillation = Distillation(
            head["out_dim"],
            head["out_dim"] if head.get("shared_head", True) else head["patch_out_dim"],
            objective_of(self.config),
            temperatures_of(self.config),
        )
        self.classifier = self._classifier()  # trained with the student, outside of its gradient clipping
        decayed, kept = decay_groups(self.student)
        decayed["params"] += self.classifier.values()
        self.optimizer = torch.optim.AdamW([decayed, kept], lr=0.0)

    def _classifier(self) -> dict[str, nn.Parameter]:
        """Weight and bias of the optional cross-entropy, by their names in the case's file; empty where it is off."""
        if not (self.config.get("supervised_loss") and self.config.get("celoss_coefficient")):
            return {}
        names = [key for kind in ("weight", "bias") for key in self.case.weights if key.endswith(f"linear.{kind}")]
        return {name: nn.Parameter(self.case.weights[name].clone()) for name in names}

    def scheduled(self, step: int) -> tuple[float, float, float]:
        """Learning rate, weight decay and teacher momentum of an iteration."""
        config, total = self.config, self.config["epochs"]
        warmup = config.get("warmup_epochs", 0)
        rate = warmup_cosine_value(step, total, config["lr"], config["min_lr"], warmup)
        decay = warmup_cosine_value(step, total, config["weight_decay"], config["weight_decay_end"])
        return rate, decay, warmup_cosine_value(step, total, config["momentum_teacher"], 1.0)

    def step(self, number: int) -> Tensors:
        prefix = f"step{number}/"
        inputs = {k.removeprefix(prefix): v for k, v in self.case.inputs.items() if k.startswith(prefix)}
        rate, decay, momentum = self.scheduled(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        set_weight_decay(self.optimizer, decay)
        parts, total = self._losses(inputs, number)
        self.optimizer.zero_grad()
        total.backward()
        found = {"loss": total, "cls": parts[0], "patch": parts[1], "mim": parts[2]}
        found |= self._gradients() if number >= self.config.get("grad_epoch", 0) else {}
        frozen = number < self.config.get("freeze_last_layer", 0)
        prepare_gradients(self.student, max_norm=self.config.get("clip_grad"), freeze_prototypes=frozen)
        self.optimizer.step()
        follow(self.teacher, self.student, momentum)
        found["lr_wd_m"] = torch.tensor([rate, decay, momentum], dtype=torch.float64)
        found |= {"center": self.distillation.center, "center2": self.distillation.patch_center}
        state = self.state()
        track = self.config.get("track", ())
        wanted = {f"{part}.{name}" for part in ("student", "teacher") for name in track} | set(track)
        found |= {name: value for name, value in state.items() if name in wanted}
        return {prefix + name: value.detach().clone() for name, value in found.items()}

    def _losses(self, inputs: Mapping[str, Tensor], epoch: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        views = view_outputs(
            self.student,
            self.teacher,
            collected(inputs, "global"),
            collected(inputs, "local"),
            masks_of(self.config, inputs),
            attention=bool(self.config.get("weighted_pool")),
        )
        parts = self.distillation(views, inputs["labels"], epoch)
        total = parts.total
        if self.classifier:
            logits = F.linear(views.student.cls, *self.classifier.values())
            extra = prototype_cross_entropy(logits, inputs["labels"], as_released=True)
            total = total + self.config["celoss_coefficient"] * extra
        return (parts.cls, parts.patch, parts.mim), total

    def _gradients(self) -> Tensors:
        parameters = dict(self.student.named_parameters()) | self.classifier
        chosen = {name: parameters[name].grad for name in self.config.get("grads", ()) if name in parameters}
        return {f"grad_{name}": value.clone() for name, value in chosen.items() if value is not None}

    def state(self) -> Tensors:
        parts = {"student": self.student, "teacher": self.teacher}
        states = {
            f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()
        }
        return states | {name: parameter.detach() for name, parameter in self.classifier.items()}


def train(case: GoldenCase) -> Tensors:
    loop = TrainingLoop(case)
    outputs: Tensors = {}
    for number in range(case.config.get("run_epochs", case.config["epochs"])):
        outputs |= loop.step(number)
    for name, value in loop.state().items():
        outputs[f"final/{name}"] = value
        if name.endswith("qkv.bias"):
            query, _, own = value.chunk(3)
            outputs[f"final_qv/{name}"] = torch.cat([query, own])
    return outputs


ADAPTERS: dict[str, Adapter] = {
    "smkd_ce_loss": ce_loss,
    "smkd_few_shot_eval": few_shot_eval,
    "smkd_forward": forward,
    "smkd_loss": loss,
    "smkd_masks": masks,
    "smkd_schedules": schedules,
    "smkd_train": train,
}
