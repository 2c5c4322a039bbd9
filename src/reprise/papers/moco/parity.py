"""Golden cases of facebookresearch/moco and moco-v3, by kind; several processes are followed one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reprise.data.imagenet_views import pillow_blur
from reprise.golden import Adapter, GoldenCase
from reprise.nn.batch_norm import SplitBatchNorm, SyncBatchNorm
from reprise.papers.moco.criterion import in_batch_contrast
from reprise.papers.moco.encoders import Encoder, Norm, ResNet, VisionTransformer, grid_positions
from reprise.papers.moco.model import Contrast, MoCo, MoCoV3
from reprise.papers.moco.probe import LinearClassifier
from reprise.papers.moco.weights import import_backbone, import_weights, official_name
from reprise.training import schedules
from reprise.training.optimizers import LARS
from reprise.training.probes import Features, knn_scores

Tensors = dict[str, Tensor]
MAIN_MOMENTUM = 0.9  # of SGD, the official default


def with_queue(case: GoldenCase) -> Tensors:
    """MoCo v1 and v2 under DistributedDataParallel: batch norm per rank, rank 0's buffers sent before each forward."""
    config, world = case.config, case.config["world_size"]
    ranks = [_moco(case, nn.BatchNorm2d)]
    ranks += [copy.deepcopy(ranks[0]) for _ in range(world - 1)]
    optimizers = [_sgd(rank.parameters(), config) for rank in ranks]
    name = partial(official_name, residual=True)
    outputs: Tensors = {}
    for step in range(config["steps"]):
        for rank in ranks[1:]:
            _copy_buffers(ranks[0], rank)
        results = _queue_step(ranks, *(case.inputs[f"step{step}/{key}"] for key in ("im_q", "im_k", "idx_shuffle")))
        for number, result in enumerate(results):
            outputs |= _contrast_outputs(f"step{step}/rank{number}" if world > 1 else f"step{step}", result)
        _average_gradients(ranks, [result.loss for result in results])
        if step in config.get("grad_steps", [0]):
            outputs |= _gradients(ranks[0], name, f"step{step}")
        for optimizer in optimizers:
            optimizer.step()
        outputs |= _queue_outputs(ranks[0], f"step{step}") | _tracked(ranks[0], config.get("track", []), name, step)
    outputs |= _final(ranks[0], name)
    for number, rank in enumerate(ranks):
        outputs |= {f"final_rank{number}/{key.removeprefix('final/')}": v for key, v in _final(rank, name).items()}
    return outputs


def _queue_step(ranks: list[MoCo], query: Tensor, keyed: Tensor, permutation: Tensor) -> list[Contrast]:
    """What `MoCo.contrast` does on each rank, with the exchange between ranks written out."""
    rows = len(query) // len(ranks)
    queries = [rank(part) for rank, part in zip(ranks, query.split(rows), strict=True)]
    for rank in ranks:
        rank.move()
    parts = keyed[permutation.long()].split(rows)
    shuffled = torch.cat([rank.keys(part, None) for rank, part in zip(ranks, parts, strict=True)])
    keys = shuffled[permutation.long().argsort()]
    results = [
        rank.compare(mine, positive, keys)
        for rank, mine, positive in zip(ranks, queries, keys.split(rows), strict=True)
    ]
    for rank in ranks:
        assert rank.queue is not None
        rank.queue.enqueue(keys)
    return results


def cifar_demo(case: GoldenCase) -> Tensors:
    config = case.config
    norm = partial(SplitBatchNorm, splits=config["bn_splits"], interleaved=True)
    model = _moco(case, norm if config["bn_splits"] > 1 else nn.BatchNorm2d, stem="cifar")
    name = partial(official_name, residual=True, demo=True)
    optimizer = _sgd(model.parameters(), config)
    outputs: Tensors = {}
    for step in range(config["steps"]):
        view1, view2 = case.inputs[f"step{step}/im1"], case.inputs[f"step{step}/im2"]
        orders = sorted(key for key in case.inputs if key.startswith(f"step{step}/idx_shuffle"))
        result = model.contrast(view1, view2, [case.inputs[key].long() for key in orders])
        optimizer.zero_grad()
        result.loss.backward()
        if step == 0:
            outputs |= _gradients(model, name, "step0")
        optimizer.step()
        outputs |= {f"step{step}/loss": result.loss.detach()} | _queue_outputs(model, f"step{step}")
    model.eval()
    return outputs | _final(model, name) | {"eval_features": model(case.inputs["step0/im1"]).detach()}


def in_batch(case: GoldenCase) -> Tensors:
    """MoCo v3; synchronised batch norm makes several ranks one process whose loss is their mean."""
    config, inputs = case.config, case.inputs
    model = _moco_v3(case)
    name = partial(official_name, residual=isinstance(model.encoder, ResNet))
    outputs = _v3_evaluation(model, inputs["step0/x1"][: config["batch_per_rank"]])
    frozen = [float(not parameter.requires_grad) for parameter in model.base_encoder.parameters()]
    outputs["step0/params_without_grad"] = torch.tensor(frozen)
    optimizer = _v3_optimizer(model, config)
    total, warmup, done = (
        config[key] * config["iters_per_epoch"] for key in ("epochs", "warmup_epochs", "start_epoch")
    )
    factor = schedules.cosine(_dummy(1.0), total_steps=total, warmup_steps=warmup).lr_lambdas[0]
    for step in range(config["steps"]):
        rate = config["lr"] * factor(done + step)
        momentum = config["moco_m"]
        if config["moco_m_cos"]:
            momentum = schedules.cosine_value(done + step, total, momentum, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        result = model.contrast(inputs[f"step{step}/x1"], inputs[f"step{step}/x2"], momentum)
        optimizer.zero_grad()
        result.loss.backward()
        outputs |= _gradients(model, name, f"step{step}")
        optimizer.step()
        outputs[f"step{step}/lr_and_m"] = torch.tensor([rate, momentum])
        outputs |= _tracked(model, config.get("track", []), name, step)
        outputs |= _rank_losses(result, config, step)
    outputs |= _final(model, name)
    for key in [key for key in outputs if key.startswith("final/") and key.endswith("attn.qkv.bias")]:
        query, _, value = outputs[key].chunk(3)
        outputs[key.replace("final/", "final_qv/")] = torch.cat([query, value])
    return outputs


def _rank_losses(result: Contrast, config: Mapping[str, Any], step: int) -> Tensors:
    """The loss of every rank: the mean over its own queries."""
    rows = result.rows.detach().split(config["batch_per_rank"])
    if config["world_size"] == 1:
        return {f"step{step}/loss": result.loss.detach()}
    return {f"step{step}/rank{number}/loss": part.mean() for number, part in enumerate(rows)}


def _v3_evaluation(model: MoCoV3, image: Tensor) -> Tensors:
    model.eval()
    with torch.no_grad():
        embedded = model.base_encoder(image)
        outputs = {"eval/base_features": embedded, "eval/predictor": model.predictor(embedded)}
    model.train()
    return outputs


def v3_loss(case: GoldenCase) -> Tensors:
    outputs: Tensors = {}
    for temperature in case.config["T"]:
        q1, q2 = (case.inputs[name].clone().requires_grad_() for name in ("q1", "q2"))
        one = in_batch_contrast(q1, case.inputs["k2"], temperature).mean()
        two = in_batch_contrast(q2, case.inputs["k1"], temperature).mean()
        (one + two).backward()
        outputs[f"T{temperature}/loss"] = torch.stack([one, two, one + two]).detach()
        outputs |= {f"T{temperature}/grad_{name}": _gradient(q) for name, q in (("q1", q1), ("q2", q2))}
    return outputs


def positions(case: GoldenCase) -> Tensors:
    return {
        f"pos{number}": grid_positions(rows, columns, dim, temperature=temperature, released=True)
        for number, (rows, columns, _, dim, temperature) in enumerate(case.config["grids"])
    }


def v3_schedules(case: GoldenCase) -> Tensors:
    outputs: Tensors = {}
    for number, setting in enumerate(case.config["settings"]):
        iters = setting["iters"]
        total, warmup = setting["epochs"] * iters, setting["warmup_epochs"] * iters
        base = setting["base_lr"] * setting["batch_size"] / 256
        factor = schedules.cosine(_dummy(1.0), total_steps=total, warmup_steps=warmup).lr_lambdas[0]
        rows = [
            [base * factor(step), schedules.cosine_value(step, total, setting["moco_m"], 1.0)] for step in range(total)
        ]
        outputs[f"lr_m{number}"] = torch.tensor(rows)
    return outputs


def learning_rate(case: GoldenCase) -> Tensors:
    outputs: Tensors = {}
    for number, setting in enumerate(case.config["settings"]):
        epochs, optimizer = setting["epochs"], _dummy(setting["lr"])
        if setting.get("cos", False):
            schedule = schedules.epoch_cosine(optimizer, total_steps=epochs, steps_per_epoch=1)
        else:
            schedule = schedules.step(optimizer, milestones=setting["schedule"])
        outputs[f"lr{number}"] = torch.tensor(
            [setting["lr"] * schedule.lr_lambdas[0](epoch) for epoch in range(epochs)]
        )
    return outputs


def split_batch_norm(case: GoldenCase) -> Tensors:
    config, weights = case.config, dict(case.weights)
    norm = SplitBatchNorm(config["features"], config["splits"], interleaved=True)
    norm.load_state_dict(weights, strict="num_batches_tracked" in weights)
    outputs: Tensors = {}
    for step in range(config["steps"]):
        value = case.inputs[f"x{step}"].clone().requires_grad_()
        norm.zero_grad()
        result = norm(value)
        result.backward(case.inputs["cotangent"])
        outputs |= {f"y{step}": result.detach(), f"grad_x{step}": _gradient(value)}
        outputs |= {f"grad_weight{step}": _gradient(norm.weight), f"grad_bias{step}": _gradient(norm.bias)}
        outputs |= {f"{key}{step}": norm.state_dict()[key].clone() for key in ("running_mean", "running_var")}
    return outputs | {"y_eval": norm.eval()(case.inputs["x0"]).detach()}


def nearest_neighbours(case: GoldenCase) -> Tensors:
    bank = Features(case.inputs["bank"], case.inputs["bank_labels"].long())
    score = partial(knn_scores, case.inputs["features"], bank, case.config["classes"])
    return {
        f"pred{number}": score(k=k, temperature=temperature).argmax(1)
        for number, (k, temperature) in enumerate(case.config["settings"])
    }


def linear_classification(case: GoldenCase) -> Tensors:
    config, inputs = case.config, case.inputs
    model = _classifier(case, _resnet(config["arch"], nn.BatchNorm2d), "fc")
    optimizer = _sgd(model.head.parameters(), config)
    outputs = {"logits_before": model(inputs["step0/images"]).detach()}
    for step in range(config["steps"]):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[f"step{step}/images"]), inputs[f"step{step}/target"].long()).backward()
        optimizer.step()
        outputs |= {f"step{step}/fc.{key}": value.clone() for key, value in model.head.state_dict().items()}
    return outputs | {"logits_after": model(inputs["step0/images"]).detach()}


def v3_classifier(case: GoldenCase) -> Tensors:
    model = _classifier(case, _v3_encoder(case.config["arch"]), "fc" if "fc.weight" in case.inputs else "head")
    image = case.inputs["images"]
    return {"features": model.encoder.features(image).detach(), "logits": model(image).detach()}


def augmentation(case: GoldenCase) -> Tensors:
    from torchvision.transforms.v2 import functional as tvf

    image = case.inputs["image"].permute(2, 0, 1)
    made = {f"blur{i}": pillow_blur(image, sigma) for i, sigma in enumerate(case.config["sigmas"])}
    made["solarize"] = tvf.solarize(image, 128.0)
    return {name: value.permute(1, 2, 0).contiguous() for name, value in made.items()}


def _classifier(case: GoldenCase, encoder: Encoder, head: str) -> LinearClassifier:
    """A frozen official encoder under the case's own linear layer."""
    model = LinearClassifier(encoder, case.config["num_classes"])
    encoder.load_state_dict(import_backbone(case.weights, encoder))
    model.head.load_state_dict({key: case.inputs[f"{head}.{key}"] for key in ("weight", "bias")})
    return model.train()  # its encoder stays in evaluation mode


def _resnet(arch: Mapping[str, Any], norm: Norm, **options: Any) -> ResNet:
    return ResNet(
        "basic" if arch["block"] == "BasicBlock" else "bottleneck",
        arch["layers"],
        width=arch["width"],
        norm=norm,
        **options,
    )


def _moco(case: GoldenCase, norm: Norm, **options: Any) -> MoCo:
    config = case.config
    model = MoCo(
        _resnet(config["arch"], norm, **options),
        dim=config["dim"],
        queue_size=config["K"],
        mlp=config.get("mlp", False),
        momentum=config["m"],
        temperature=config["T"],
        symmetric=config.get("symmetric", False),
    )
    model.load_state_dict(import_weights(case.weights, model))
    return model


def _v3_encoder(arch: Mapping[str, Any]) -> Encoder:
    if arch["kind"] == "resnet":
        return _resnet(arch, SyncBatchNorm)
    return VisionTransformer(
        image_size=arch["image_hw"],
        patch=arch["patch"],
        width=arch["embed_dim"],
        depth=arch["depth"],
        num_heads=arch["heads"],
        mlp_ratio=arch["mlp_ratio"],
        conv_stem=arch["conv_stem"],
        freeze_patches=arch["stop_grad_conv1"],
        norm=SyncBatchNorm,
    )


def _moco_v3(case: GoldenCase) -> MoCoV3:
    config = case.config
    encoder = _v3_encoder(config["arch"])
    model = MoCoV3(encoder, dim=config["dim"], mlp_dim=config["mlp_dim"], temperature=config["T"])
    model.load_state_dict(import_weights(case.weights, model))
    return model


def _sgd(parameters: Any, config: Mapping[str, Any]) -> torch.optim.SGD:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    momentum = config.get("sgd_momentum", MAIN_MOMENTUM)
    return torch.optim.SGD(trained, lr=config["lr"], momentum=momentum, weight_decay=config["weight_decay"])


def _v3_optimizer(model: MoCoV3, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config["optimizer"] == "lars":
        momentum = config.get("sgd_momentum", MAIN_MOMENTUM)
        return LARS(trained, lr=config["lr"], weight_decay=config["weight_decay"], momentum=momentum)
    return torch.optim.AdamW(trained, lr=config["lr"], weight_decay=config["weight_decay"])


def _dummy(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    for theirs, ours in zip(source.buffers(), target.buffers(), strict=True):
        ours.copy_(theirs)


def _average_gradients(ranks: list[MoCo], losses: list[Tensor]) -> None:
    for rank, loss in zip(ranks, losses, strict=True):
        rank.zero_grad()
        loss.backward()
    for shared in zip(*(rank.parameters() for rank in ranks), strict=True):
        if shared[0].requires_grad:
            mean = torch.stack([_gradient(parameter) for parameter in shared]).mean(0)
            for parameter in shared:
                parameter.grad = mean.clone()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _gradients(model: nn.Module, name: Callable[[str], str], prefix: str) -> Tensors:
    found = {key: value.grad for key, value in model.named_parameters()}
    return {f"{prefix}/grad_{name(key)}": value.clone() for key, value in found.items() if value is not None}


def _tracked(model: nn.Module, wanted: list[str], name: Callable[[str], str], step: int) -> Tensors:
    named = {name(key): value for key, value in model.state_dict().items()}
    return {f"step{step}/{key}": named[key].clone() for key in wanted}


def _queue_outputs(model: MoCo, prefix: str) -> Tensors:
    assert model.queue is not None
    return {f"{prefix}/queue": model.queue.keys.clone(), f"{prefix}/queue_ptr": model.queue.position.clone()}


def _final(model: nn.Module, name: Callable[[str], str]) -> Tensors:
    return {f"final/{name(key)}": value.clone() for key, value in model.state_dict().items()}


def _contrast_outputs(prefix: str, result: Contrast) -> Tensors:
    order = result.logits.detach().argsort(dim=1, descending=True)[:, :5]
    hit = order == result.label[:, None]
    share = torch.stack([100 * hit[:, :1].float().sum(1).mean(), 100 * hit.float().sum(1).mean()])
    values = {"logits": result.logits, "labels": result.label, "loss": result.loss, "acc1_acc5": share}
    return {f"{prefix}/{key}": value.detach() for key, value in values.items()}


ADAPTERS: dict[str, Adapter] = {
    "moco_aug": augmentation,
    "moco_cifar_demo": cifar_demo,
    "moco_knn": nearest_neighbours,
    "moco_lincls": linear_classification,
    "moco_lr": learning_rate,
    "moco_split_bn": split_batch_norm,
    "moco_v1": with_queue,
    "moco_v2": with_queue,
    "mocov3": in_batch,
    "mocov3_import": v3_classifier,
    "mocov3_loss": v3_loss,
    "mocov3_pos_embed": positions,
    "mocov3_schedules": v3_schedules,
}
