"""What a model costs: parameters, multiply-adds, memory, one optimizer step; on the meta device where it can be."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from reprise.data.spec import DataSpec
from reprise.training.module import PaperModule

Batch = Mapping[str, Any]

# What code that looks at values raises on meta tensors.
NO_VALUES = (RuntimeError, TypeError)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of training on one device: what is kept between steps, and what the forward pass keeps for the backward."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of the full-size model: `device` is `cpu` or `meta`, `loss` is None on meta.

    `ranks` is how many the process took part among: more than one exist in name only (`as_rank_of`).
    """

    device: str
    batch_size: int
    loss: float | None
    seconds: float
    ranks: int = 1


def count_parameters(module: nn.Module) -> int:
    """Numbers of the model that the card's sizes speak of: of `module.model` where there is one, shared ones once."""
    model = getattr(module, "model", module)
    return sum(parameter.numel() for parameter in model.parameters())


def example_batch(module: nn.Module, spec: DataSpec, batch_size: int) -> Batch:
    """A random training batch on the default device.

    The module's own `example_batch(batch_size)` where it defines one; else, for images, every key that
    docs/architecture.md names for image batches (one box an image).

    Raises:
        ValueError: the items are not images and the module defines no `example_batch`.
    """
    own = getattr(module, "example_batch", None)
    if own is not None:
        return own(batch_size)
    if spec.image_shape is None:
        raise ValueError(f"{type(module).__name__} defines no example_batch(batch_size), and {spec.name} has no images")
    channels, height, width = spec.image_shape
    target = {
        "labels": torch.zeros(1, dtype=torch.int64),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]),
        "size": torch.tensor([height, width]),
    }
    return {
        "image": torch.randn(batch_size, channels, height, width),
        "mask": torch.zeros(batch_size, height, width, dtype=torch.bool),
        "label": torch.zeros(batch_size, dtype=torch.int64),
        "index": torch.arange(batch_size),
        "targets": [dict(target) for _ in range(batch_size)],
    }


def forward_arguments(module: nn.Module, batch: Batch) -> dict[str, Any]:
    """The entries of a batch that `module.forward` takes, by name.

    Raises:
        ValueError: forward needs an argument that the batch lacks.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    lacking = [p.name for p in named if p.default is p.empty and p.name not in batch]
    if lacking:
        raise ValueError(f"{type(module).__name__}.forward needs {', '.join(lacking)}, which the example batch lacks")
    return {p.name: batch[p.name] for p in named if p.name in batch}


def multiply_adds(module: nn.Module, batch: Batch) -> int:
    """Multiply-adds of one forward pass in evaluation mode: matrix products, convolutions and attention products."""
    from torch.utils.flop_counter import FlopCounterMode

    with _evaluating(module), _no_fast_path(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**forward_arguments(module, batch))
    return counter.get_total_flops() // 2


def estimate_memory(module: PaperModule, batch: Batch) -> MemoryEstimate:
    """Estimated bytes of training with this batch; exact for all but temporary buffers when run on meta tensors."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    kept = [*module.parameters(), *module.buffers()]
    return MemoryEstimate(
        parameters=sum(map(_bytes, kept)),
        gradients=sum(map(_bytes, trained)),
        optimizer=_optimizer_bytes(module, trained),
        activations=_activation_bytes(module, batch),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _optimizer_bytes(module: PaperModule, trained: list[nn.Parameter]) -> int:
    """Bytes of the optimizer's state after a step on zero gradients; two copies of the parameters if it refuses."""
    optimizer = build_optimizer(module)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
        tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return sum(map(_bytes, tensors))
    except NO_VALUES:
        return 2 * sum(map(_bytes, trained))
    finally:
        module.zero_grad(set_to_none=True)


def build_optimizer(module: PaperModule) -> torch.optim.Optimizer:
    """The module's (first) optimizer, without its schedule."""
    configured = module.configure_optimizers()
    if isinstance(configured, dict):
        configured = configured["optimizer"]
    while isinstance(configured, list | tuple):
        configured = configured[0]
    return configured


def _activation_bytes(module: nn.Module, batch: Batch) -> int:
    """Bytes of all tensors that one forward pass in training mode saves for the backward pass, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in [*module.parameters(), *module.buffers()]}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            saved.setdefault(key, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(**forward_arguments(module, batch))
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del output
    return total


def optimizer_step(module: PaperModule, batch: Batch) -> float | None:
    """One training step on one batch; the loss, None on the meta device.

    As Lightning would, closure and all, but without a Trainer, whose hooks fetch pretrained weights; inside one where
    the module optimizes by hand or asks for its trainer.
    """
    module.train()
    if not module.automatic_optimization:
        return _step_in_trainer(module, batch)
    try:
        return _bare_step(module, batch)
    except RuntimeError as error:
        if "not attached to a `Trainer`" not in str(error):
            raise
        return _step_in_trainer(module, batch)


def _bare_step(module: PaperModule, batch: Batch) -> float | None:
    optimizer = build_optimizer(module)
    losses: list[Tensor] = []

    def closure() -> Any:
        optimizer.zero_grad()
        output: Any = module.training_step(batch, 0)
        loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
        losses.append(loss.detach())
        loss.backward()
        return loss

    with _quiet():
        optimizer.step(closure)
    return None if losses[0].is_meta else float(losses[0])


def _step_in_trainer(module: PaperModule, batch: Batch) -> float:
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    one_batch: DataLoader[Batch] = DataLoader(cast("Any", [batch]), batch_size=None)
    with _quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            logger=False,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, train_dataloaders=one_batch)
    return float(trainer.callback_metrics.get("train/loss", torch.tensor(float("nan"))))


def timed_step(build: Callable[[], tuple[PaperModule, Batch]], device: str, batch_size: int) -> StepResult:
    """Build a module and a batch on a device and make one optimizer step."""
    with torch.device(device):
        module, batch = build()
        started = time.perf_counter()
        loss = optimizer_step(module, batch)
    return StepResult(device, batch_size, loss, time.perf_counter() - started)


@contextmanager
def as_rank_of(world: int) -> Iterator[None]:
    """This process as rank 0 of `world` ranks that exist in name only (torch's fake process group).

    Collectives have the shapes that they have among so many ranks, and wait for nobody; values are not those of a run.
    """
    from torch import distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Fused attention kernels hide their products from the counter."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's remarks about logging without a trainer do not apply to a dry step."""
    import logging

    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
