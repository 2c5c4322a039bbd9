"""The repeated blocks of a network: where activations are checkpointed, and what is gathered together under FSDP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from reprise.errors import ConfigError


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The trained blocks that a network is a row of: members of lists and sequences, all of one class.

    Residual blocks and Transformer layers are such; single layers (convolutions, linear maps) are not, nor are blocks
    inside of blocks or blocks without trained parameters (momentum encoders, frozen stages).
    """
    found: list[nn.Module] = []
    rest = [module]
    while rest:
        part = rest.pop()
        children = list(part.children())
        if isinstance(part, nn.ModuleList | nn.Sequential) and _is_row(children):
            found += [child for child in children if any(p.requires_grad for p in child.parameters())]
        else:
            rest += reversed(children)
    return found


def _is_row(members: list[nn.Module]) -> bool:
    composed = all(any(True for _ in member.children()) for member in members)
    return composed and len({type(member) for member in members}) == 1


@contextmanager
def compiled_blocks(module: nn.Module) -> Iterator[None]:
    """While the body runs, the repeated blocks are compiled with torch.compile; without any, the whole of `model`.

    Blocks are called by their forward in whatever way a paper calls its network, and compiling them takes seconds and
    not minutes. What follows training (second derivatives among it) is not compiled.

    Raises:
        ConfigError: there is neither.
    """
    parts = repeated_blocks(module) or [part for name, part in module.named_children() if name == "model"]
    if not parts:
        raise ConfigError(
            f"{type(module).__name__} has no repeated blocks and no `model` that could be compiled",
            looked_at="compile",
            next_step="set it to false",
        )
    for part in parts:
        part.compile(dynamic=False)  # blocks of other sizes are compiled again, not for any size
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


def checkpoint_activations(module: nn.Module) -> int:
    """Keep only the inputs of the repeated blocks for the backward pass, which repeats each block's forward pass.

    Results are the same, bit for bit: dropout draws its numbers again, and running statistics move once.

    Returns:
        How many blocks there are.

    Raises:
        ConfigError: the network has no repeated blocks.
    """
    blocks = repeated_blocks(module)
    if not blocks:
        raise ConfigError(
            f"{type(module).__name__} has no repeated blocks whose activations could be checkpointed",
            looked_at="trainer.activation_checkpointing",
            next_step="set it to false",
        )
    for block in blocks:
        contexts = partial(_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    return len(blocks)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass, and for its repetition."""
    return nullcontext(), _statistics_put_aside(block)


@contextmanager
def _statistics_put_aside(block: nn.Module) -> Iterator[None]:
    """Let normalisation layers move copies of their running statistics."""
    norms = [module for module in block.modules() if isinstance(module, _NormBase)]
    kept = [dict(norm._buffers) for norm in norms]
    try:
        for norm in norms:
            norm._buffers.update({k: v.clone() for k, v in norm._buffers.items() if v is not None})
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
