"""`reprise weights import`: official files under our key names, without running code from them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from reprise import config as configuration
from reprise import discovery
from reprise.errors import CheckpointError, ConfigError
from reprise.paths import data_root
from reprise.training.instantiate import instantiate
from reprise.training.torchscript import is_torchscript, read_torchscript

if TYPE_CHECKING:
    import numpy as np

READABLE = (".pth", ".pth.tar", ".pt", ".bin", ".ckpt", ".npz", ".safetensors")
STATE_KEYS = ("model", "state_dict", "params")  # where training scripts keep the state; a paper's weights.py may add
DDP = "module."
REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")  # in torch.load's message

# What training scripts save beside the weights: their arguments, and NumPy numbers among the optimizer's settings.
BESIDE_WEIGHTS = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",  # NumPy 1
    "numpy._core.multiarray.scalar",  # NumPy 2
)


class Unread:
    """Stands in a checkpoint for an object that lies beside the weights: it takes everything and keeps nothing.

    So neither argparse nor NumPy ever gets the file's bytes to rebuild an object from.
    """

    __slots__ = ()

    def __new__(cls, *_: object) -> Self:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


def find_weights(name: str, slug: str, *, next_step: str) -> Path:
    """A file of official weights, by its path or by its name below `<data root>/<slug>`.

    Raises:
        CheckpointError: it is in neither place; `next_step` says where it comes from.
    """
    places = [Path(name).expanduser(), data_root() / slug / name]
    for place in places:
        if place.is_file():
            return place
    raise CheckpointError(
        f"the pre-trained weights {name!r} do not exist",
        looked_at=" and ".join(str(place.absolute()) for place in places),
        next_step=next_step,
    )


def read_weights(path: Path, state_keys: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of an official file by their own names: PyTorch (`.pth`, `.pt`, TorchScript), `.npz`, `.safetensors`.

    A whole checkpoint is opened at the first of `state_keys` and `STATE_KEYS` that it has; what lies beside (optimizer,
    epoch, arguments) is left out, and so is the prefix of DistributedDataParallel.

    Args:
        state_keys: where a paper's checkpoints keep their state, the most wanted first.

    Raises:
        CheckpointError: no such file, another format, or content that is not plain tensors.
    """
    if not path.is_file():
        raise CheckpointError("the weights file does not exist", looked_at=path.resolve(), next_step="check src=")
    try:
        return _read(path, state_keys)
    except CheckpointError:
        raise
    except Exception as error:  # each format has its own ways to fail on a damaged file
        raise CheckpointError(
            f"the weights file cannot be read as plain tensors: {_reason(error, path)}",
            looked_at=path.resolve(),
            next_step="download it again; files that need code to be loaded are refused",
        ) from error


def _read(path: Path, state_keys: Sequence[str]) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            return {name: tensor_of(np.asarray(arrays[name])) for name in arrays.files}
    if not path.name.endswith(READABLE):
        raise CheckpointError(
            f"unknown kind of weights file {path.suffix!r}", looked_at=path, next_step=f"use {READABLE}"
        )
    if is_torchscript(path):
        return read_torchscript(path)
    with torch.serialization.safe_globals([(Unread, name) for name in BESIDE_WEIGHTS]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return _state_in(content, (*state_keys, *STATE_KEYS), path)


def _state_in(content: object, state_keys: Sequence[str], path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint, under the names that the network has outside DistributedDataParallel."""
    state = content
    for key in state_keys:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(_is_entry(name, value) for name, value in state.items()):
        raise CheckpointError(
            f"the file holds no state dict of tensors, but {_described(state)}",
            looked_at=f"{path.resolve()}: its top and {', '.join(state_keys)}",
            next_step="check that the file belongs to this paper",
        )
    wrapped = all(name.startswith(DDP) for name in state)
    return {name.removeprefix(DDP) if wrapped else name: value for name, value in state.items()}


def _is_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _described(content: object) -> str:
    if isinstance(content, dict):
        return f"a dictionary with the keys {', '.join(str(key) for key in list(content)[:8])}"
    return f"one {type(content).__name__}"


def _reason(error: Exception, path: Path) -> str:
    """What is wrong with the file, without torch.load's advice to trust it (the error that it wraps has none)."""
    inner = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
    text = str(inner or error)
    if refused := REFUSED_GLOBAL.search(text):
        return f"it asks for {refused[1]}, which is refused"
    if path.suffix not in (".safetensors", ".npz") and not _is_of_pytorch(path):
        return "it is no PyTorch file (neither a zip archive nor a pickle)"
    kind = type(inner or error).__name__
    return text.splitlines()[0] if re.search("[A-Za-z]", text) else f"{kind} {text}".strip()


def _is_of_pytorch(path: Path) -> bool:
    """Whether a file begins like those that PyTorch writes now (zip), or wrote before 1.6 (pickle)."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor; what NumPy shows as 2 raw bytes is bfloat16 (JAX's files) and becomes float32."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16).float()
    return torch.from_numpy(array)


def import_weights_file(overrides: Sequence[str], source: Path, target: Path) -> int:
    """Map an official file to the model of a recipe and write it as safetensors; returns the number of tensors.

    The paper's `weights.py` maps the names (`import_weights`) and may say where its checkpoints keep the state
    (`STATE_KEYS`, the most wanted first).

    Raises:
        CheckpointError: the file cannot be read, or keys are left over on either side.
        ConfigError: the paper has no weights to import.
    """
    from safetensors.torch import save_file

    slug, _ = configuration.experiment_of(overrides)
    if not discovery.has_module(slug, "weights"):
        raise ConfigError(f"the paper {slug} has no official weights", looked_at=discovery.paper_dir(slug))
    official = discovery.module(slug, "weights")
    state = read_weights(source, getattr(official, "STATE_KEYS", ()))
    cfg = configuration.compose(overrides)
    with torch.device("meta"):
        model = instantiate(cfg.paper.model, path="paper.model")
    mapped = official.import_weights(state, model)
    model.load_state_dict(mapped, strict=True, assign=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(_apart(mapped), target, metadata={"paper": slug})
    return len(mapped)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own, as safetensors wants it: layers that share one have it under each name."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
