"""What golden cases of detectors share: images, targets, losses and gradients under the names they have there."""

from __future__ import annotations

from torch import Tensor, nn

from reprise.golden import GoldenCase, gradient_of
from reprise.nn.set_loss import SetLoss

Tensors = dict[str, Tensor]


def images_of(case: GoldenCase, prefix: str = "") -> list[Tensor]:
    """The inputs `img0`, `img1`, ... float [3, H, W], of unequal sizes."""
    count = sum(name.startswith(f"{prefix}img") for name in case.inputs)
    return [case.inputs[f"{prefix}img{index}"] for index in range(count)]


def targets_of(case: GoldenCase, count: int, prefix: str = "") -> list[Tensors]:
    """Labels, boxes and (where the case has them) masks of `count` images."""
    fields = ("labels", "boxes", "masks")
    names = [{field: f"{prefix}tgt{index}_{field}" for field in fields} for index in range(count)]
    return [{field: case.inputs[name] for field, name in one.items() if name in case.inputs} for one in names]


def losses_of(loss: SetLoss) -> Tensors:
    """Unweighted losses under official names (class errors in percent), and the total."""
    parts = {
        f"loss/{name}": value.detach() * (100.0 if name.startswith("class_error") else 1.0)
        for name, value in loss.parts.items()
    }
    return parts | {"loss_total": loss.total.detach()}


def gradients_of(case: GoldenCase, network: nn.Module) -> Tensors:
    """Gradients of the parameters that the case asks for."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    return {f"grad_{name}": gradient_of(parameters[name]) for name in case.config["grads"]}
