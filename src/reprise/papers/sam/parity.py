"""Adapters for the golden cases: training steps of davda54/sam (PyTorch) and google-research/sam (JAX)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.optim import RMSpropTF
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from reprise.golden import Adapter, GoldenCase, gradient_of
from reprise.papers.sam.criterion import smoothed_divergence
from reprise.papers.sam.model import MLP, ProjectedWideResNet
from reprise.papers.sam.weights import flax_names, import_weights, projected_wide_resnet_names
from reprise.training.sharpness import SAM, frozen_statistics

Outputs = dict[str, Tensor]
BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def smooth_cross_entropy(case: GoldenCase) -> Outputs:
    """The example's loss and the gradient of its mean, for each smoothing."""
    outputs: Outputs = {}
    for number, smoothing in enumerate(case.config["smoothing"]):
        logits = case.inputs["logits"].clone().requires_grad_()
        losses = smoothed_divergence(logits, case.inputs["labels"], smoothing)
        outputs[f"loss{number}"] = losses.detach()
        outputs[f"grad{number}"] = torch.autograd.grad(losses.mean(), logits)[0]
    return outputs


class RecordedStep:
    """A closure for one step on one batch that notes losses, perturbations and the gradient at w + eps."""

    def __init__(self, model: nn.Module, optimizer: SAM, loss: Callable[[], Tensor]) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.losses: list[Tensor] = []
        self.perturbation: Outputs = {}
        self.gradient_norm = torch.tensor(0.0)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        self.perturbation = {name: p.detach() - self.before[name] for name, p in self.model.named_parameters()}
        loss = self.loss()
        loss.backward()
        if not self.losses:
            self.gradient_norm = self._gradient_norm()
        self.losses.append(loss.detach())
        return loss

    def _gradient_norm(self) -> Tensor:
        """The norm that the release divides by in its first pass; our optimizer makes no such pass where rho is 0."""
        members = [(p, g["adaptive"]) for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        return get_total_norm([gradient_of(p) * (p.detach().abs() if flag else 1.0) for p, flag in members])

    def second_pass_of_the_release(self) -> None:
        """Where rho is 0 the release makes its second pass all the same, which counts the batch once more."""
        if len(self.losses) == 1:
            with frozen_statistics(self.model), torch.no_grad():
                self.loss()

    def outputs(self) -> Outputs:
        norm = self.gradient_norm if self.optimizer.ascent_norm is None else self.optimizer.ascent_norm
        return {"loss": self.losses[0], "loss_perturbed": self.losses[-1], "grad_norm": norm}


def _groups(case: GoldenCase, model: MLP) -> list[dict[str, Any]]:
    parameters = {name.removeprefix("layers."): p for name, p in model.named_parameters()}
    groups = case.config.get("groups") or [{"names": list(parameters)}]
    return [
        {"params": [parameters[name] for name in group["names"]]} | {k: v for k, v in group.items() if k != "names"}
        for group in groups
    ]


def mlp_steps(case: GoldenCase) -> Outputs:
    """Steps of davda54's wrapper on a tanh network; base optimizer, groups and frozen parameters from the config."""
    config = case.config
    model = MLP(config["dims"], "tanh")
    model.load_state_dict(import_weights(case.weights, model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.removeprefix("layers.") not in config.get("frozen", ()))
    base = partial(BASES[config["base"]], **config["base_options"])
    optimizer = SAM(_groups(case, model), base, config["rho"], adaptive=config["adaptive"])
    optimizer.attach(model)
    outputs: Outputs = {}
    for step, (x, y) in enumerate(zip(case.inputs["x"], case.inputs["y"], strict=True)):
        recorded = RecordedStep(model, optimizer, _smoothed_loss(model, x, y, config["label_smoothing"]))
        optimizer.step(recorded)
        found = recorded.outputs()
        for name, parameter in model.named_parameters():
            short = name.removeprefix("layers.")
            if step in config.get("record_perturbation_steps", ()):
                found[f"e/{short}"] = recorded.perturbation[name]
            if parameter.grad is not None and step in config.get("record_sam_grad_steps", ()):
                found[f"sam_grad/{short}"] = parameter.grad.clone()
            found[f"param/{short}"] = parameter.detach().clone()
        outputs |= {f"step{step}/{name}": value for name, value in found.items()}
    return outputs


def _smoothed_loss(model: nn.Module, x: Tensor, y: Tensor, smoothing: float) -> Callable[[], Tensor]:
    return lambda: smoothed_divergence(model(x), y, smoothing).mean()


def example_rate(base: float, epoch: int, epochs: int) -> float:
    """davda54's example: the rate is cut to a fifth at 30, 60 and 80 % of the epochs."""
    return base * 0.2 ** sum(epoch >= epochs * tenths / 10 for tenths in (3, 6, 8))


def example_wide_resnet(case: GoldenCase) -> Outputs:
    """The example's training loop (one batch an epoch); its schedule acts with the epoch's number after the batch."""
    config = case.config
    model = ProjectedWideResNet(config["depth"], config["width_factor"], config["labels"], case.inputs["x"].shape[2])
    model.load_state_dict(import_weights(case.weights, model))
    base = partial(torch.optim.SGD, **config["base_options"])
    optimizer = SAM(model.parameters(), base, config["rho"], adaptive=config["adaptive"])
    optimizer.attach(model)
    outputs: Outputs = {}
    for step, (x, y) in enumerate(zip(case.inputs["x"], case.inputs["y"], strict=True)):
        recorded = RecordedStep(model, optimizer, _smoothed_loss(model, x, y, config["label_smoothing"]))
        optimizer.step(recorded)
        recorded.second_pass_of_the_release()
        rate = example_rate(config["base_options"]["lr"], step, config["steps"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        found = recorded.outputs() | {"lr_after": torch.tensor(rate)}
        state = model.state_dict()
        found |= {f"param/{theirs}": state[ours].clone() for ours, theirs in projected_wide_resnet_names(model).items()}
        outputs |= {f"step{step}/{name}": value for name, value in found.items()}
    model.eval()
    with torch.no_grad():
        outputs["eval_logits"] = model(case.inputs["x"][0])
    return outputs


class FlaxBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose running variance averages the BIASED batch variance, as flax's does."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if self.momentum and self.running_mean is not None and self.running_var is not None:
            variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class FlaxConvNet(nn.Module):
    """The cases' convolution network: (3x3 convolution, norm, relu) a width, stride 2 after the first; mean; dense."""

    def __init__(self, in_channels: int, widths: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (fan_in, fan_out) in enumerate(pairwise([in_channels, *widths[:-1]])):
            layers += [Conv2dSame(fan_in, fan_out, 3, 1 if number == 0 else 2, bias=False)]
            layers += [FlaxBatchNorm2d(fan_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-2], widths[-1])

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).mean((2, 3)))


class Replicas:
    """One model that stands for several replicas: shared parameters, normalisation statistics of their own."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self.model = model
        self.statistics = [{name: b.clone() for name, b in model.named_buffers()} for _ in range(count)]

    def __call__(self, replica: int, x: Tensor) -> Tensor:
        buffers = dict(self.model.named_buffers())
        for name, value in self.statistics[replica].items():
            buffers[name].copy_(value)
        logits = self.model(x)
        self.statistics[replica] = {name: b.clone() for name, b in self.model.named_buffers()}
        return logits


def _google_model(case: GoldenCase) -> nn.Module:
    config = case.config
    kinds: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: MLP([math.prod(config["input_shape"]), *config["widths"]], "tanh"),
        "conv": lambda: FlaxConvNet(config["input_shape"][-1], config["widths"]),
    }
    model = kinds[config["model"]]()
    model.load_state_dict(import_weights(case.weights, model), strict=False)  # flax counts no batches
    return model


def _google_optimizer(case: GoldenCase, model: nn.Module) -> SAM:
    config = case.config
    decay, rate = config["weight_decay"], config["learning_rate"]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1]},
    ]
    if config["no_weight_decay_on_bn"]:
        groups[1]["weight_decay"] = 0.0
    base: Callable[..., torch.optim.Optimizer] = partial(torch.optim.SGD, lr=rate, momentum=0.9, nesterov=True)
    if config["use_rmsprop"]:
        base = partial(RMSpropTF, lr=rate, alpha=0.9, eps=0.001, momentum=0.9, lr_in_momentum=False)
    parts = config["replicas"] > 1 and not config["sync_perturbations"]
    optimizer = SAM(
        groups,
        partial(base, weight_decay=decay),
        config["sam_rho"],
        decay_in_perturbation=True,
        clip_norm=config["gradient_clipping"] or None,
        sub_batch=config["batch"] // config["replicas"] if parts else None,
    )
    optimizer.attach(model)
    return optimizer


def google_steps(case: GoldenCase) -> Outputs:
    """Steps of the authors' training function; replicas with their own perturbation are sub-batches of one process."""
    config = case.config
    model = _google_model(case)
    optimizer = _google_optimizer(case, model)
    replicas = Replicas(model, config["replicas"])
    outputs: Outputs = {}
    for step, (x, y) in enumerate(zip(case.inputs["x"], case.inputs["y"], strict=True)):
        rate = _google_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = x.permute(0, 3, 1, 2) if config["model"] == "conv" else x  # the MLP flattens NHWC
        loss = _google_step(optimizer, replicas, {"x": x, "y": y}, config["label_smoothing"])
        found = {"lr": torch.tensor(rate), "loss_perturbed": loss}
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found["grad_norm_after_clipping"] = get_total_norm(gradients)
        found |= {f"param/{name}": value for name, value in _in_flax(model, dict(model.named_parameters()))}
        outputs |= {f"step{step}/{name}": value for name, value in found.items()}
    for replica, statistics in enumerate(replicas.statistics):
        for name, value in _in_flax(model, statistics):
            outputs[f"state_after/replica{replica}/{name.removeprefix('state.')}"] = value
    return outputs


def _google_step(optimizer: SAM, replicas: Replicas, batch: dict[str, Tensor], smoothing: float) -> Tensor:
    """One step; returns the loss at the perturbed weights, averaged over the replicas."""
    losses: dict[int, Tensor] = {}
    count = len(replicas.statistics)

    def closure() -> Tensor:
        optimizer.zero_grad()
        part = optimizer.select(batch)
        members = list(range(count)) if optimizer.part is None else [optimizer.part]
        for replica, x, y in zip(members, part["x"].chunk(len(members)), part["y"].chunk(len(members)), strict=True):
            loss = F.cross_entropy(replicas(replica, x), y, label_smoothing=smoothing)
            losses[replica] = loss.detach()
            (loss / len(members)).backward()
        return torch.stack(list(losses.values())).mean()

    return optimizer.step(closure)


def _google_rate(config: Mapping[str, Any], step: int) -> float:
    rate = config["learning_rate"]
    if config["schedule"] == "constant":
        return rate
    if config["schedule"] == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / config["steps"]))
    raise ValueError(f"unknown schedule {config['schedule']!r}")


def _in_flax(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for ours, (theirs, transform) in flax_names(model).items():
        if ours in tensors:
            yield theirs, transform(tensors[ours].detach()).clone()


ADAPTERS: dict[str, Adapter] = {
    "sam_smooth_cross_entropy": smooth_cross_entropy,
    "sam_mlp_steps": mlp_steps,
    "sam_example_wide_resnet": example_wide_resnet,
    "sam_google_steps": google_steps,
}
