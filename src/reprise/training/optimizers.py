"""Optimizers that published recipes use and torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class _ByParameter(Optimizer):
    """An optimizer that updates each parameter by itself."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class MomentumSGD(_ByParameter):
    """SGD whose momentum is kept in a narrower type between steps: m <- g + momentum * m, p <- p - lr * m.

    The sum is formed in the parameter's precision and only what is stored is rounded; but the factor takes the stored
    type as well, so that with bfloat16 a momentum of 0.9 acts as 0.8984375. This is what
    google-research/vision_transformer fine-tunes with (optax.sgd with accumulator_dtype), and its numbers need both.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: decay of the accumulator.
        accumulator: "bfloat16" or "float32".

    Raises:
        ValueError: an unknown accumulator type.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, momentum: float = 0.9, accumulator: str = "bfloat16"
    ) -> None:
        if accumulator not in DTYPES:
            raise ValueError(f"unknown accumulator {accumulator!r}; one of {', '.join(DTYPES)}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "accumulator": accumulator})

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, dtype = self.state[parameter], DTYPES[group["accumulator"]]
        momentum = parameter.grad
        assert momentum is not None
        if "momentum" in state:
            factor = float(torch.tensor(group["momentum"], dtype=dtype))
            momentum = momentum + factor * state["momentum"].to(parameter.dtype)
        parameter.add_(momentum, alpha=-float(group["lr"]))
        # after a resume torch has widened the stored values, which changes none of them
        state["momentum"] = momentum.to(dtype, copy=True)


class LARS(_ByParameter):
    """Layer-wise adaptive rate scaling: m <- momentum * m + r * (g + weight_decay * p), p <- p - lr * m.

    r = trust_coefficient * |p| / |g + weight_decay * p| for each matrix (You et al. 2017, 1708.03888, section 4); 1
    where either norm is 0. Parameters with one dimension (biases, norms) get neither decay nor scaling, as in BYOL,
    SimCLR and MoCo v3.

    Args:
        params: parameters or groups.
        lr: learning rate.
        weight_decay: coupled decay of matrices.
        momentum: decay of the accumulated update.
        trust_coefficient: r's factor.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"trust_coefficient": trust_coefficient})

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        update = parameter.grad
        assert update is not None
        if parameter.ndim > 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            length, size = parameter.norm(), update.norm()
            ratio = group["trust_coefficient"] * length / size
            update = update * torch.where((length > 0) & (size > 0), ratio, torch.ones_like(ratio))
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(group["momentum"]).add_(update)
        parameter.add_(state["momentum"], alpha=-float(group["lr"]))
