"""The weights inside a TorchScript archive, without running any of the code in it.

An archive is a zip file: `data.pkl` describes the modules' attributes, `data/<n>` are the tensors' bytes, and `code/`
says of each class which attributes are parameters and buffers (the rest are constants such as attention masks).
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Node:
    """A module of the archive: its class's name and its attributes."""

    qualified_name = ""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as opposed to a plain checkpoint."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their dotted names, as `torch.jit.load(path).state_dict()` would give them.

    Raises:
        ValueError: the archive holds something else than modules and tensors.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition("/")[0]
        module = _Reader(archive, root).load()
        if not isinstance(module, Node):
            raise ValueError(f"the archive holds {type(module).__name__}, not a module")
        return dict(_tensors(module, _Classes(archive, root), ""))


def _tensors(node: Node, classes: _Classes, prefix: str) -> Iterator[tuple[str, Tensor]]:
    stored = classes.stored(node.qualified_name)
    for name, value in node.attributes.items():
        if isinstance(value, Node):
            yield from _tensors(value, classes, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and name in stored:
            yield f"{prefix}{name}", value


class _Classes:
    """Which attributes of a class are parameters or buffers, read from the archive's code as text."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self._archive, self._root = archive, root
        self._known: dict[str, set[str]] = {}

    def stored(self, qualified_name: str) -> set[str]:
        if qualified_name not in self._known:
            module, _, name = qualified_name.rpartition(".")
            text = self._archive.read(f"{self._root}/code/{module.replace('.', '/')}.py").decode()
            body = re.split(rf"^class {re.escape(name)}\(", text, flags=re.MULTILINE)[1]
            head = re.split(r"^class ", body, flags=re.MULTILINE)[0]
            lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]", head, flags=re.MULTILINE)
            self._known[qualified_name] = {found for text in lists for found in re.findall(r'"([^"]+)"', text)}
        return self._known[qualified_name]


class _Reader(pickle.Unpickler):
    """Rebuilds tensors and attribute trees; every other global is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (Node,), {"qualified_name": f"{module}.{name}"})
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        harmless: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "tensor", "double", "bool")},
        }
        if (module, name) not in harmless:
            raise ValueError(f"the archive asks for {module}.{name}, which is refused")
        return harmless[module, name]

    def persistent_load(self, identity: Any) -> Tensor:
        _, dtype, key, _, count = identity
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0)
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not math.prod(size):
        return storage.new_empty(size)
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()
