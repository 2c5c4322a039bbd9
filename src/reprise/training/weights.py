"""`reprise weights import`: official files under our key names, without running code from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reprise import config as configuration
from reprise import discovery
from reprise.errors import CheckpointError, ConfigError
from reprise.training.instantiate import instantiate
from reprise.training.torchscript import is_torchscript, read_torchscript

if TYPE_CHECKING:
    import numpy as np

READABLE = (".pth", ".pt", ".bin", ".ckpt", ".npz", ".safetensors")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of an official file by their own names: `.pth`/`.pt` (tensors, TorchScript), `.npz`, `.safetensors`.

    A dictionary under `model`, `state_dict` or `params` is opened.

    Raises:
        CheckpointError: no such file, another format, or content that is not plain tensors.
    """
    if not path.is_file():
        raise CheckpointError("the weights file does not exist", looked_at=path.resolve(), next_step="check src=")
    try:
        return _read(path)
    except CheckpointError:
        raise
    except Exception as error:  # each format has its own ways to fail on a damaged file
        raise CheckpointError(
            f"the weights file cannot be read as plain tensors: {str(error).splitlines()[0]}",
            looked_at=path.resolve(),
            next_step="download it again; files that need code to be loaded are refused",
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            return {name: tensor_of(np.asarray(arrays[name])) for name in arrays.files}
    if path.suffix not in READABLE:
        raise CheckpointError(
            f"unknown kind of weights file {path.suffix!r}", looked_at=path, next_step=f"use {READABLE}"
        )
    if is_torchscript(path):
        return read_torchscript(path)
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict", "params"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError("the file holds no state dict of tensors", looked_at=path)
    return content


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor; what NumPy shows as 2 raw bytes is bfloat16 (JAX's files) and becomes float32."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16).float()
    return torch.from_numpy(array)


def import_weights_file(overrides: Sequence[str], source: Path, target: Path) -> int:
    """Map an official file to the model of a recipe and write it as safetensors; returns the number of tensors.

    Raises:
        CheckpointError: the file cannot be read, or keys are left over on either side.
        ConfigError: the paper has no weights to import.
    """
    from safetensors.torch import save_file

    slug, _ = configuration.experiment_of(overrides)
    if not discovery.has_module(slug, "weights"):
        raise ConfigError(f"the paper {slug} has no official weights", looked_at=discovery.paper_dir(slug))
    state = read_weights(source)
    cfg = configuration.compose(overrides)
    with torch.device("meta"):
        model = instantiate(cfg.paper.model, path="paper.model")
    mapped = discovery.module(slug, "weights").import_weights(state, model)
    model.load_state_dict(mapped, strict=True, assign=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in mapped.items()}, target, metadata={"paper": slug})
    return len(mapped)
