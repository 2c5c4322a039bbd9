"""Official names to ours: davda54's wide residual network, plain sequential networks, and flax layers in call order."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from reprise.errors import CheckpointError
from reprise.papers.sam.model import MLP, ProjectedWideResNet

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def projected_wide_resnet_names(model: ProjectedWideResNet) -> dict[str, str]:
    """Our key to davda54's, for every entry of the state dict."""
    names = {"stem.weight": "f.0_convolution.weight"}
    first = {"norm1": "norm_act.0_normalization", "conv1": "block.0_convolution", "norm2": "block.1_normalization"}
    first |= {"conv2": "block.4_convolution", "projection": "downsample"}
    further = {"norm1": "block.0_normalization", "conv1": "block.2_convolution"}
    further |= {"norm2": "block.3_normalization", "conv2": "block.6_convolution"}
    for s, stage in enumerate(model.stages):
        assert isinstance(stage, nn.Sequential)
        for u in range(len(stage)):
            for ours, theirs in (first if u == 0 else further).items():
                for entry in NORM if "norm" in ours else ("weight",):
                    names[f"stages.{s}.{u}.{ours}.{entry}"] = f"f.{s + 1}_block.block.{u}.{theirs}.{entry}"
    names |= {f"norm.{entry}": f"f.4_normalization.{entry}" for entry in NORM}
    return names | {f"head.{entry}": f"f.8_classification.{entry}" for entry in ("weight", "bias")}


def _reversed(value: Tensor) -> Tensor:
    return value.t()


def _hwio(value: Tensor) -> Tensor:
    return value.permute(2, 3, 1, 0)


def _same(value: Tensor) -> Tensor:
    return value


def flax_names(model: nn.Module) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Our key to (flax key, how our tensor becomes theirs), for layers registered in flax's call order.

    Flax numbers layers over all types: Conv_0, BatchNorm_1, Dense_2. Kernels are [in, out] and [H, W, in, out].
    """
    names: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
    layers = [(name, layer) for name, layer in model.named_modules() if next(layer.parameters(False), None) is not None]
    for number, (name, layer) in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            theirs = f"BatchNorm_{number}"
            names[f"{name}.weight"] = (f"{theirs}.scale", _same)
            names[f"{name}.running_mean"] = (f"state.{theirs}.mean", _same)
            names[f"{name}.running_var"] = (f"state.{theirs}.var", _same)
        else:
            convolution = isinstance(layer, nn.Conv2d)
            theirs = f"{'Conv' if convolution else 'Dense'}_{number}"
            names[f"{name}.weight"] = (f"{theirs}.kernel", _hwio if convolution else _reversed)
        if getattr(layer, "bias", None) is not None:
            names[f"{name}.bias"] = (f"{theirs}.bias", _same)
    return names


def import_weights(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict for `model` from official weights (PyTorch or flax keys, told apart by their names).

    Raises:
        CheckpointError: keys are missing or left over.
    """
    if any(name.endswith((".kernel", ".scale")) for name in state):
        flax = {ours: theirs for ours, (theirs, _) in flax_names(model).items()}
        result = _renamed(state, flax)
        return {ours: _from_flax(value) if value.ndim in (2, 4) else value for ours, value in result.items()}
    if isinstance(model, ProjectedWideResNet):
        return _renamed(state, projected_wide_resnet_names(model))
    prefix = "layers." if isinstance(model, MLP) else ""
    return _renamed(state, {ours: ours.removeprefix(prefix) for ours in model.state_dict()})


def _from_flax(kernel: Tensor) -> Tensor:
    return kernel.t() if kernel.ndim == 2 else kernel.permute(3, 2, 0, 1)


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    missing = sorted(set(names.values()) - set(state))
    left = sorted(set(state) - set(names.values()))
    if missing or left:
        raise CheckpointError(
            f"the weights do not fit the model: missing {missing or 'none'}, left over {left or 'none'}",
            looked_at="the key names of the weights file",
            next_step="choose the model that the weights belong to (depth, width, kind)",
        )
    return {ours: state[theirs] for ours, theirs in names.items()}
