"""How the devices of a run share its work: `ddp` and `fsdp`, what `conf/trainer/*.yaml` chooses from.

Neither changes what is computed beyond rounding: the global batch, the learning rate and the data order are the
configuration's, however many devices there are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from reprise.distributed import all_reduce_mean, union_over_ranks
from reprise.errors import ConfigError
from reprise.training.blocks import repeated_blocks
from reprise.training.module import PaperModule

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel

COMPRESSIONS = ("fp16", "bf16")
Sharding = Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)


def ddp(
    process_group_backend: str | None = None,
    *,
    gradient_compression: str | None = None,
    find_unused_parameters: bool = False,
    static_graph: bool = False,
    gradient_as_bucket_view: bool = True,
    bucket_cap_mb: float = 25.0,
) -> DDPStrategy:
    """A copy of the model on every device; gradients are averaged over them.

    Args:
        process_group_backend: `nccl`, `gloo`, or None for what fits the device.
        gradient_compression: send gradients as `fp16` or `bf16`, half the bytes for their precision; None sends them
            as they are. Compression with memory of past errors (PowerSGD) is not offered: what each rank remembers
            would belong in the checkpoint, and would tie it to the number of ranks.
        find_unused_parameters: look each step for parameters without a gradient, which else would be waited for.
        static_graph: the same parameters get gradients in every step; DDP then learns the order once.
        gradient_as_bucket_view: gradients live in the buffers that are sent, which saves a copy of them.
        bucket_cap_mb: size of those buffers; larger ones mean fewer and later messages.

    Raises:
        ConfigError: an unknown compression.
    """
    return DDPStrategy(
        process_group_backend=process_group_backend,
        ddp_comm_hook=_compression_hook(gradient_compression),
        find_unused_parameters=find_unused_parameters,
        static_graph=static_graph,
        gradient_as_bucket_view=gradient_as_bucket_view,
        bucket_cap_mb=bucket_cap_mb,
    )


def _compression_hook(name: str | None) -> Callable[..., Any] | None:
    if name is None:
        return None
    if name not in COMPRESSIONS:
        raise ConfigError(
            f"unknown gradient compression {name!r}",
            looked_at="trainer.gradient_compression",
            next_step=f"choose one of {', '.join(COMPRESSIONS)}, or null",
        )
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}[name]


class ShardedStrategy(FSDPStrategy):
    """Parameters, gradients and optimizer state divided over the devices: for models that do not fit one of them.

    Each repeated block of the model (`repeated_blocks`) is gathered when its turn comes and let go after it; what is
    left stays gathered during a step. Checkpoints hold whole tensors, as those of every other strategy do, so a run may
    continue without sharding. Unlike Lightning's, it reads them without unpickling code, clips by the whole norm, and
    runs on CPUs.
    """

    _root: FullyShardedDataParallel | None = None

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import CustomPolicy

        if isinstance(model, PaperModule):
            model.keep_parameter_groups()
        blocks = {id(block) for block in repeated_blocks(model)}
        scalars = [parameter for parameter in model.parameters() if not parameter.dim()]  # cannot be divided
        for scalar in scalars:
            if scalar.requires_grad:
                scalar.register_post_accumulate_grad_hook(_average_gradient)
        self._root = FullyShardedDataParallel(
            model,
            ignored_states=scalars,
            auto_wrap_policy=CustomPolicy(lambda module: id(module) in blocks),
            device_id=self.root_device,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )
        for scalar in scalars:
            scalar.data = scalar.data.to(self.root_device)
        for module in model.modules():
            if isinstance(module, Metric):
                module.to(self.root_device)
        if isinstance(model, PaperModule):
            vars(model)["on_validation_epoch_end"] = partial(self._gathered, model.on_validation_epoch_end)
        return self._root

    def _gathered(self, work: Callable[[], None]) -> None:
        """Do `work` as the module's forward pass, for which FSDP gathers what is outside of the blocks."""
        module = self.sharded_model.module
        forward = module.forward
        module.forward = work
        try:
            self.sharded_model()
        finally:
            module.forward = forward

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The content of a checkpoint of whole tensors, after every rank has taken its part of them."""
        content = self.checkpoint_io.load_checkpoint(Path(self.broadcast(checkpoint_path)), weights_only=True)
        with _whole_tensors(self.sharded_model):
            self.sharded_model.load_state_dict(content.pop("state_dict"))
            if self.lightning_module is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
                for optimizer, state in zip(self.optimizers, content["optimizer_states"], strict=True):
                    self._load_optimizer(optimizer, state)
        return content

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state with parameters numbered in the order of their groups, as a plain optimizer has it."""
        from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        root, state = self.sharded_model, self._whole_optimizer_state(plain)
        return FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, root, optim=plain)

    def _whole_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gathered one quantity after another: FSDP gathers all of a block into one buffer, which CPUs do not copy."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        own, root = optimizer.state_dict(), self.sharded_model
        with _whole_tensors(root):
            whole = FullyShardedDataParallel.optim_state_dict(root, optimizer, {**own, "state": {}})
            for name in union_over_ranks({name for values in own["state"].values() for name in values}):
                held = {key: {name: values[name]} for key, values in own["state"].items() if name in values}
                part = FullyShardedDataParallel.optim_state_dict(root, optimizer, {**own, "state": held})
                for key, values in part["state"].items():
                    kept = {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}
                    whole["state"].setdefault(key, {}).update(kept)
        return whole

    def _load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

        if not state["state"]:
            return
        root, name = self.sharded_model, OptimStateKeyType.PARAM_NAME
        named = FullyShardedDataParallel.rekey_optim_state_dict(state, name, root, optim=optimizer)
        optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(root, optimizer, named))

    @property
    def sharded_model(self) -> FullyShardedDataParallel:
        """The wrapper of the module at work."""
        assert self._root is not None, "the model is not sharded yet"
        return self._root


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    all_reduce_mean(parameter.grad)


def _whole_tensors(root: FullyShardedDataParallel) -> AbstractContextManager[Any]:
    """State dicts with whole tensors, on every rank."""
    from torch.distributed.fsdp import (
        FullOptimStateDictConfig,
        FullStateDictConfig,
        FullyShardedDataParallel,
        StateDictType,
    )

    return FullyShardedDataParallel.state_dict_type(
        root,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(rank0_only=False),
        FullOptimStateDictConfig(rank0_only=False),
    )


def fsdp(
    process_group_backend: str | None = None, *, sharding_strategy: Sharding = "FULL_SHARD", cpu_offload: bool = False
) -> ShardedStrategy:
    """Every device keeps a part of the model (`ShardedStrategy`).

    Args:
        process_group_backend: `nccl`, `gloo`, or None for what fits the device.
        sharding_strategy: `FULL_SHARD` (parameters, gradients, optimizer state), `SHARD_GRAD_OP` (parameters stay whole
            between forward and backward: faster, larger) or `HYBRID_SHARD` (divided within a node, copied across).
        cpu_offload: keep parameters and gradients in the CPU's memory between their uses.

    Raises:
        ConfigError: an unknown way of sharding.
    """
    if sharding_strategy not in SHARDINGS:
        raise ConfigError(
            f"unknown way of sharding {sharding_strategy!r}",
            looked_at="trainer.strategy.sharding_strategy",
            next_step=f"choose one of {', '.join(SHARDINGS)}",
        )
    return ShardedStrategy(
        process_group_backend=process_group_backend, sharding_strategy=sharding_strategy, cpu_offload=cpu_offload
    )
