"""The base of every paper's LightningModule: optimizer and schedule from parts, and pictures for the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from reprise.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reprise.data.module import DataModule

Made = TypeVar("Made")
OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
ScheduleFactory = Callable[[Optimizer], LRScheduler]
# Hooks in which Lightning logs for the step and not for the epoch, unless it is told otherwise.
STEP_HOOKS = frozenset(
    {"training_step", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad", "on_train_batch_start"}
)


class StepLog(Protocol):
    """Where the values of a training step go; `is_wanted` says whether this step's are."""

    is_wanted: bool

    def add(self, name: str, value: float | Tensor, *, sync_dist: bool) -> None: ...


@runtime_checkable
class Attachable(Protocol):
    """An optimizer that has to know the module whose closure it runs, such as `sharpness.SAM`."""

    def attach(self, module: nn.Module) -> None: ...


@dataclass(frozen=True)
class Picture:
    """One figure for the report: a file-name stem, the figure, and one sentence that says what to see in it."""

    name: str
    figure: Figure
    caption: str


class PaperModule(LightningModule):
    """What all papers share; a paper's module adds its model, its loss and its metrics.

    Args:
        optimizer: a factory from parameter groups to an optimizer (a Hydra `_partial_`).
        schedule: a factory from an optimizer to a learning-rate schedule stepped once per training step, or None.

    Attributes:
        refuses: what the method cannot do, and why: `accumulation` (trainer.accumulate_grad_batches) or `sharding`
            (trainer=fsdp). A run that asks for it ends with the reason.
        parts: in how many parts a step goes through its batch; the losses of the parts are averaged.
        whole_batch: with more parts than one, all of them, for losses that divide by a count over the batch.
    """

    refuses: Mapping[str, str] = {}
    parts: int = 1
    whole_batch: Any = None

    def __init__(self, optimizer: OptimizerFactory, schedule: ScheduleFactory | None = None) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.make_schedule = schedule
        self.step_log: StepLog | None = None
        self._groups: list[Any] = []

    @property
    def data(self) -> DataModule:
        """The data module of the run at hand."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def parameter_groups(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """What the optimizer gets; override for per-group learning rates or weight decay."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def keep_parameter_groups(self) -> None:
        """Decide the groups now: sharded parameters have neither their shapes nor all of their entries."""
        self._groups = list(self.parameter_groups())

    def configure_optimizers(self) -> Any:
        optimizer = _made(self.make_optimizer, self._groups or self.parameter_groups(), "optimizer")
        if isinstance(optimizer, Attachable):
            optimizer.attach(self)
        if self.make_schedule is None:
            return optimizer
        schedule = _made(self.make_schedule, optimizer, "schedule")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Lightning's, but the values of a training step go to `step_log`, which drops what nobody sees.

        Means over ranks are exact: Lightning averages integer counts of items, and cuts off the half. They are taken
        where the module is: what was computed on the CPU (a detector's scores) is of no use to NCCL.
        """
        if isinstance(value, Tensor):
            value = value.to(self.device)
        if options.get("batch_size") is not None:
            options["batch_size"] = float(options["batch_size"])
        of_step = self._current_fx_name in STEP_HOOKS and not options.get("on_epoch")
        if self.step_log is None or args or not of_step or not isinstance(value, Tensor | int | float):
            super().log(name, value, *args, **options)
        elif self.step_log.is_wanted:
            self.step_log.add(name, value, sync_dist=options.get("sync_dist", False))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch as it is on the CPU, where batches are made; Lightning would look at every tensor of it."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Lightning's, with two gaps closed.

        Under FSDP each rank holds a part of the gradient, whose norm is that of the whole. With bfloat16 Lightning
        refuses fused optimizers, which unscale gradients themselves; but only float16 scales any.
        """
        wrapper, precision = self.trainer.strategy.model, self.trainer.precision_plugin
        limit = 0.0 if gradient_clip_algorithm == "value" else gradient_clip_val or 0.0
        if limit and isinstance(wrapper, FullyShardedDataParallel):
            wrapper.clip_grad_norm_(limit)
        elif limit and isinstance(precision, MixedPrecision) and precision.scaler is None:
            precision.clip_grad_by_norm(optimizer, limit)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def continue_from(self, state: Mapping[str, Tensor]) -> None:
        """Take over what the earlier stage ended with; called before training where the arm has an `after`.

        Args:
            state: the state dict of the earlier run's module. A stage with another architecture overrides this.
        """
        self.load_state_dict(state)

    @property
    def passes_per_step(self) -> int:
        """Forward and backward passes over its batch that one training step makes (SAM: two)."""
        return getattr(getattr(self.make_optimizer, "func", None), "passes", 1)

    def pictures(self) -> Iterator[Picture]:
        """Figures that show the method at work, made once after the test with `self.data` at hand."""
        return iter(())


def _made(factory: Callable[[Any], Made], subject: Any, group: str) -> Made:
    """What a configured factory makes; an option that it does not know or refuses is the configuration's fault."""
    try:
        return factory(subject)
    except (TypeError, ValueError) as error:
        options: Mapping[str, Any] = getattr(factory, "keywords", {})
        blamed = [f"{group}.{name}={value}" for name, value in options.items() if re.search(_word(value), str(error))]
        raise ConfigError(
            f"the {group} cannot be built: {error}",
            looked_at=", ".join(blamed) or group,
            next_step=f"`--cfg job --package {group}` shows its options; a recipe may set one that this {group} lacks",
        ) from error


def _word(value: object) -> str:
    """A pattern for the value standing by itself in a message."""
    return rf"(?<![\w.-]){re.escape(str(value))}(?![\w.])"
