"""Golden cases of google-research/vision_transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reprise.golden import Adapter, GoldenCase
from reprise.papers.vit.criterion import softmax_cross_entropy
from reprise.papers.vit.model import VisionTransformer
from reprise.papers.vit.positions import resize_positions, square_grid
from reprise.papers.vit.weights import adapt_for_fine_tuning, export_weights, import_weights
from reprise.training import schedules
from reprise.training.optimizers import MomentumSGD

LINEAR_END = 1e-5  # the official schedule's default


def forward(case: GoldenCase) -> Mapping[str, Tensor]:
    """Logits, intermediates, loss and gradients of one model, in float64.

    In float32 a ReLU or a maximum of a hybrid's stem can fall on the other side than in the original.
    """
    image = case.inputs["images"].double()
    model = _build(case.config, case.config["num_classes"], image)
    model.load_state_dict(import_weights(case.weights, model))
    model.double().eval()
    encoded = model.encode(image)
    pooled = model.pool(encoded)
    logits = model.head(pooled)
    loss = softmax_cross_entropy(logits, case.inputs["labels"].long())
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    official = export_weights(gradients, model)
    outputs = {
        "logits": logits,
        "encoded": encoded,
        "pre_logits": pooled,
        "loss": loss,
        "embedding": model.embed(image),
    }
    if model.stem is not None:
        outputs["root_and_stages"] = model.stem(image)
    outputs |= {f"grad_{name}": official[name] for name in case.config.get("grads", [])}
    return {name: value.float() for name, value in outputs.items()}


def fine_tune(case: GoldenCase) -> Mapping[str, Tensor]:
    """Loading for another task and resolution, then some updates on one batch."""
    config, image, label = case.config, case.inputs["images"], case.inputs["labels"].long()
    model = _build(config["fine_tune"], config["num_classes"], image)
    model.load_state_dict(import_weights(adapt_for_fine_tuning(case.weights, model, as_released=True), model))
    outputs = {f"loaded/{name}": value.clone() for name, value in export_weights(model.state_dict(), model).items()}
    outputs["logits_initial"] = model(image)
    optimizer = MomentumSGD(
        model.parameters(), lr=config["base_lr"], accumulator=config.get("accumulator_dtype") or "float32"
    )
    schedule = _schedule(optimizer, config, config["base_lr"])
    losses, rates = [], []
    for step in range(config["steps"]):
        loss = softmax_cross_entropy(model(image), label)  # accum_steps only splits the batch
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config["grad_norm_clip"] or math.inf)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        official = export_weights(model.state_dict(), model)
        outputs |= {f"step{step}/{name}": official[name].clone() for name in config["track"]}
    return outputs | {"losses": torch.stack(losses), "lr": torch.tensor(rates), "logits_final": model(image)}


def learning_rate(case: GoldenCase) -> Mapping[str, Tensor]:
    """Rates at steps 0, stride, 2 stride, ... total of each setting."""
    outputs = {}
    for number, (arguments, stride) in enumerate(case.config["settings"]):
        base = arguments["base"]
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
        factor = _schedule(optimizer, arguments, base).lr_lambdas[0]
        steps = range(0, arguments["total_steps"] + 1, stride)
        outputs[f"lr{number}"] = torch.tensor([base * factor(step) for step in steps])
    return outputs


def resize(case: GoldenCase) -> Mapping[str, Tensor]:
    """Position tables for another number of (square) patches."""
    outputs = {}
    for number, (tokens, class_token) in enumerate(case.config["settings"]):
        table, extra = case.inputs[f"pos{number}"], int(class_token)
        old, new = square_grid(table.shape[1] - extra), square_grid(tokens - extra)
        outputs[f"resized{number}"] = resize_positions(table, old, new, class_token)
    return outputs


def _build(config: Mapping[str, Any], num_classes: int, image: Tensor) -> VisionTransformer:
    stem = config.get("resnet")
    return VisionTransformer(
        image_shape=tuple(image.shape[1:]),
        num_classes=num_classes,
        patch=config["patch"],
        width=config["hidden_size"],
        depth=config["num_layers"],
        num_heads=config["num_heads"],
        mlp_dim=config["mlp_dim"],
        classifier=config["classifier"],
        representation_size=config.get("representation_size"),
        stem_layers=stem and stem["num_layers"],
        stem_width_factor=stem["width_factor"] if stem else 1.0,
    )


def _schedule(
    optimizer: torch.optim.Optimizer, config: Mapping[str, Any], base: float
) -> torch.optim.lr_scheduler.LambdaLR:
    total, warmup = config["total_steps"], config["warmup_steps"]
    if config["decay_type"] == "cosine":
        return schedules.cosine(optimizer, total_steps=total, warmup_steps=warmup)
    if config["decay_type"] != "linear":
        raise ValueError(f"no decay {config['decay_type']!r}; there are cosine and linear")
    end = config.get("linear_end", LINEAR_END) / base
    return schedules.linear(optimizer, total_steps=total, warmup_steps=warmup, final_factor=end)


ADAPTERS: dict[str, Adapter] = {
    "vit_forward": forward,
    "vit_finetune": fine_tune,
    "vit_learning_rate": learning_rate,
    "vit_posembed_resize": resize,
}
