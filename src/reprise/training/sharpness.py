"""Sharpness-aware minimization around any optimizer, for any paper: `optimizer=sam` or `optimizer=asam`.

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization" (ICLR 2021), equations 1-3 and
algorithm 1; Kwon et al., "ASAM" (ICML 2021), for the adaptive variant.

    eps(w) = argmax_{||eps||_p <= rho} L(w) + eps . grad L(w)      the ascent, one gradient
    g      = grad L at w + eps(w), eps taken as constant           the descent gradient, a second one
    w     <- base optimizer's step from the ORIGINAL w with g
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from reprise.data.loader import Batch
from reprise.errors import ConfigError

BaseFactory = Callable[[list[dict[str, Any]]], Optimizer]


def worst_perturbation(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    rho: Sequence[float],
    adaptive: Sequence[bool],
    norm: float = 2.0,
    epsilon: float = 1e-12,
) -> tuple[list[Tensor], Tensor]:
    """The first-order worst neighbour of the weights (paper, equation 2), with ONE norm over all tensors.

    With 1/p + 1/q = 1 and s = g (adaptive: |w| * g):
    eps = rho * sign(s) * (|s| / ||s||_q)^(q-1), times |w| where adaptive. For p = 2 that is rho * g / ||g||_2, or
    rho * w^2 * g / || |w| g ||_2.

    Args:
        weights, gradients: tensors of equal shapes.
        rho, adaptive: the radius and the flag of each tensor (they may differ between parameter groups).
        norm: p > 1 of the ball; `inf` gives sign steps.
        epsilon: added to the norm, so that a zero gradient gives a zero perturbation (the official code adds none).

    Returns:
        The perturbations, and ||s||_q (scalar).
    """
    if not norm > 1:
        raise ValueError(f"the ball needs a norm p > 1, got {norm}")
    dual = 1.0 if math.isinf(norm) else norm / (norm - 1)
    scaled = [g * w.abs() if flag else g for w, g, flag in zip(weights, gradients, adaptive, strict=True)]
    length = get_total_norm(scaled, norm_type=dual)
    perturbations = []
    for w, s, radius, flag in zip(weights, scaled, rho, adaptive, strict=True):
        unit = s / (length + epsilon).to(s.device)
        if dual != 2:
            unit = unit.sign() * unit.abs().pow(dual - 1)
        perturbations.append(radius * (unit * w.abs() if flag else unit))
    return perturbations, length


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalisation layers use batch statistics but do not move their running averages.

    The counter of batches moves all the same (as in davda54/sam), except where the average depends on it
    (`momentum=None`).
    """
    layers = [m for m in module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    cumulative = [layer.num_batches_tracked for layer in layers if layer.momentum is None]
    counts = [(counter, counter.clone()) for counter in cumulative if counter is not None]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for counter, count in counts:
            counter.copy_(count)


def capture_random_state(device: torch.device) -> Callable[[], None]:
    """Remember Python's, NumPy's and torch's generators; the returned function puts them back."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return restore


class SAM(Optimizer):
    """Takes two gradients a step and hands the second, taken at the worst neighbour, to a base optimizer.

    `step(closure)` needs a closure that clears the gradients, then computes the loss and its gradients: Lightning's
    automatic optimization passes one. Both passes see the same randomness. Parameter groups are shared with the base
    optimizer, so that schedules act on it, and the state dict is the base optimizer's. `attach(module)` lets the second
    pass leave normalisation statistics alone, and finds the DDP wrapper. Whatever else a forward pass changes (a
    queue, a counter) changes twice.

    Under DDP each replica perturbs by the gradient of its own part of the batch (m-sharpness; paper, section 4.1)
    unless `sync_perturbations`.

    Args:
        params: parameters or groups; a group may have its own `rho` and `adaptive`.
        base: a factory from groups to the base optimizer (a Hydra `_partial_`).
        rho: radius of the ball. Where every group has 0, a step is the base optimizer's with one closure call.
        adaptive: ASAM, a ball that scales with |w|; takes a rho about ten times larger.
        norm: p of the ball, > 1 or inf; the paper uses 2.
        decay_in_perturbation: the groups' weight decay is part of the loss in both passes, wd * w and wd * (w + eps),
            as in google-research/sam. False: it stays with the base optimizer and acts at w.
        clip_norm: limit of the global norm of the descent gradient (weight decay included if it is part of it).
        epsilon: added to the norm of the ascent gradient.
        sync_perturbations: average the ascent gradient over DDP replicas before it is normalised.
        sub_batch: m: items that share a perturbation; the batch is cut into such parts and their gradients are
            averaged. The module must take its part through `select`.
        base_options: handed to the base optimizer, so that a recipe's `optimizer.lr` still acts under `optimizer=sam`.
    """

    passes = 2  # forward and backward passes a step

    def __init__(
        self,
        params: Iterable[Any],
        base: BaseFactory,
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        norm: float = 2.0,
        decay_in_perturbation: bool = False,
        clip_norm: float | None = None,
        epsilon: float = 1e-12,
        sync_perturbations: bool = False,
        sub_batch: int | None = None,
        **base_options: Any,
    ) -> None:
        if sub_batch is not None and (sub_batch < 1 or sync_perturbations):
            raise ValueError("sub_batch must be positive, and excludes sync_perturbations")
        if not norm > 1:
            raise ValueError(f"the ball needs a norm p > 1, got {norm}")
        super().__init__(params, {"rho": rho, "adaptive": adaptive})
        if any(group["rho"] < 0 for group in self.param_groups):
            raise ValueError("rho must not be negative")
        self.base = base(self.param_groups, **base_options)
        self.defaults = {**self.base.defaults, **self.defaults}
        self._share()
        self.norm = norm
        self.decay_in_perturbation = decay_in_perturbation
        self.clip_norm = clip_norm
        self.epsilon = epsilon
        self.sync_perturbations = sync_perturbations
        self.sub_batch = sub_batch
        self.ascent_norm: Tensor | None = None  # of the latest step: ||g||_q before the perturbation
        self._module: nn.Module | None = None
        self._part: int | None = None
        self._selected: tuple[int, int] | None = None

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self._share()

    def attach(self, module: nn.Module) -> None:
        """Tell the optimizer which module its closure runs: a LightningModule, a DDP wrapper or a plain module."""
        self._module = module

    @property
    def part(self) -> int | None:
        """The number of the sub-batch at work, or None while the whole batch is."""
        return self._part

    def select(self, batch: Batch) -> Batch:
        """The sub-batch that the closure has to work on now (the whole batch without `sub_batch`)."""
        if self._part is None or self.sub_batch is None:
            return batch
        size = len(next(iter(batch.values())))
        first = self._part * self.sub_batch
        chosen = slice(first, min(first + self.sub_batch, size))
        self._selected = (chosen.stop - chosen.start, size)
        return {name: value[chosen] for name, value in batch.items()}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure runs twice (or twice a sub-batch).

        Returns:
            What the closure returned last: the loss at the perturbed weights.
        """
        if closure is None:
            raise ConfigError(
                "SAM needs two gradients a step, but was asked to step without a closure",
                looked_at="trainer.precision (16-mixed steps outside the closure), manual optimization",
                next_step="use precision bf16-mixed or 32, or call step(closure)",
            )
        self._refuse_what_would_be_wrong()
        wrapper = self._ddp()
        if not any(group["rho"] for group in self.param_groups):
            result = closure()
            self._add_decay()
        elif self.sub_batch is not None:
            result = self._step_in_parts(closure, wrapper)
        else:
            by_hand = self.decay_in_perturbation and not self.sync_perturbations  # wd * eps differs between replicas
            result = self._two_passes(closure, wrapper, local_descent=by_hand)
            if wrapper is not None and by_hand:
                self._average_gradients(wrapper)
        self._clip()
        with self._decay_applied():
            self.base.step()
        return result

    def _two_passes(
        self, closure: Callable[[], Any], wrapper: DistributedDataParallel | None, *, local_descent: bool = False
    ) -> Any:
        restore_randomness = capture_random_state(self.param_groups[0]["params"][0].device)
        with _without_sync(wrapper, not self.sync_perturbations):
            closure()
        self._add_decay()
        weights = self.perturb()
        try:
            restore_randomness()
            still = frozen_statistics(self._module) if self._module is not None else nullcontext()
            with still, _without_sync(wrapper, local_descent):
                result = closure()
            self._add_decay()
        finally:
            with torch.no_grad():
                for parameter, weight in weights:
                    parameter.copy_(weight)
        return result

    def _step_in_parts(self, closure: Callable[[], Any], wrapper: DistributedDataParallel | None) -> Any:
        total: dict[nn.Parameter, Tensor] = {}
        done, size, self._part = 0, 1, 0
        try:
            while done < size:
                self._selected = None
                result = self._two_passes(closure, wrapper, local_descent=True)
                if self._selected is None:
                    raise ConfigError(
                        "optimizer.sub_batch is set, but this module's training step works on whole batches",
                        looked_at=type(self._module).__name__,
                        next_step="take the batch through optimizer.select(batch), or set optimizer.sub_batch=null",
                    )
                taken, size = self._selected
                for parameter in self._with_gradient():
                    share = self._gradient(parameter) * (taken / size)
                    total[parameter] = total[parameter] + share if parameter in total else share
                done += taken
                self._part += 1
        finally:
            self._part = None
        for parameter, gradient in total.items():
            parameter.grad = gradient
        if wrapper is not None:
            self._average_gradients(wrapper)
        return result

    @torch.no_grad()
    def perturb(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Move to w + eps(w) with the gradients at hand.

        Returns:
            Each moved parameter with its weights before, to be copied back.
        """
        members = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not members:
            return []
        perturbations, self.ascent_norm = worst_perturbation(
            [p for p, _ in members],
            [self._gradient(p) for p, _ in members],
            rho=[group["rho"] for _, group in members],
            adaptive=[group["adaptive"] for _, group in members],
            norm=self.norm,
            epsilon=self.epsilon,
        )
        before = [(p, p.detach().clone()) for p, _ in members]
        for (parameter, _), perturbation in zip(members, perturbations, strict=True):
            parameter.add_(perturbation)
        return before

    def _with_gradient(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @staticmethod
    def _gradient(parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    @torch.no_grad()
    def _add_decay(self) -> None:
        if not self.decay_in_perturbation:
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and group.get("weight_decay", 0.0):
                    parameter.grad.add_(parameter, alpha=group["weight_decay"])

    @contextmanager
    def _decay_applied(self) -> Iterator[None]:
        """Where the decay is in the gradients already, the base optimizer must not apply it again."""
        decays = [group.get("weight_decay") for group in self.param_groups] if self.decay_in_perturbation else []
        try:
            for group, decay in zip(self.param_groups, decays, strict=False):
                if decay is not None:
                    group["weight_decay"] = 0.0
            yield
        finally:
            for group, decay in zip(self.param_groups, decays, strict=False):
                if decay is not None:
                    group["weight_decay"] = decay

    @torch.no_grad()
    def _clip(self) -> None:
        gradients = [self._gradient(p) for p in self._with_gradient()]
        if self.clip_norm is None or not gradients:
            return
        scale = (self.clip_norm / get_total_norm(gradients)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device))

    @torch.no_grad()
    def _average_gradients(self, wrapper: DistributedDataParallel) -> None:
        group = wrapper.process_group
        for parameter in self._with_gradient():
            dist.all_reduce(self._gradient(parameter), group=group)
            self._gradient(parameter).div_(dist.get_world_size(group))

    def _ddp(self) -> DistributedDataParallel | None:
        module: Any = self._module
        if isinstance(module, LightningModule):
            module = module.trainer.strategy.model
        return module if isinstance(module, DistributedDataParallel) else None

    def _refuse_what_would_be_wrong(self) -> None:
        if not isinstance(self._module, LightningModule):
            return
        trainer = self._module.trainer
        parts = trainer.accumulate_grad_batches * getattr(self._module, "parts", 1)
        if parts != 1:
            raise ConfigError(
                "SAM cannot accumulate gradients over parts of a batch: each pass needs the whole gradient",
                looked_at=f"trainer.accumulate_grad_batches = {parts}",
                next_step="set it to 1; optimizer.sub_batch=m works on small parts with their own perturbations",
            )
        if trainer.gradient_clip_val and (self.decay_in_perturbation or trainer.gradient_clip_algorithm == "value"):
            raise ConfigError(
                "the trainer's gradient clipping would turn the direction of SAM's ascent",
                looked_at=f"trainer.gradient_clip_val = {trainer.gradient_clip_val}",
                next_step="use optimizer.clip_norm, which clips the descent gradient only",
            )
        if isinstance(trainer.strategy.model, DistributedDataParallel) and trainer.strategy.model.static_graph:
            raise ConfigError(
                "SAM's two passes a step are averaged differently, and DDP's static graph allows one way",
                looked_at="trainer.strategy.static_graph",
                next_step="set it to false",
            )
        if isinstance(trainer.strategy.model, FullyShardedDataParallel):
            raise ConfigError(
                "SAM needs the norm of the whole gradient, and under FSDP each rank holds a shard",
                looked_at="trainer.strategy",
                next_step="use trainer=ddp",
            )


def _without_sync(wrapper: DistributedDataParallel | None, local: bool) -> AbstractContextManager[Any]:
    return wrapper.no_sync() if wrapper is not None and local else nullcontext()
