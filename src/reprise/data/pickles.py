"""Reading pickled arrays without running code: only the named constructors can be called."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reprise.errors import DataError


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 stores bytes; other codecs are not needed by any data set."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
    return text.encode("latin1")


def _reconstruct(cls: type, shape: tuple[int, ...], kind: bytes | str) -> np.ndarray[Any, Any]:
    """An empty array, to be filled by the pickle's state."""
    if cls is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("only plain arrays are allowed")
    return np.ndarray(shape, dtype=kind.decode() if isinstance(kind, bytes) else kind)


ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Builds numbers, strings, bytes, lists, dicts, arrays, and what `extra` names: (module, name) -> callable."""

    def __init__(self, file: Any, extra: Mapping[tuple[str, str], Callable[..., Any]] | None = None) -> None:
        super().__init__(file, encoding="bytes")
        self.allowed = {**ALLOWED, **(extra or {})}

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed in a data file")
        return self.allowed[module_name, global_name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("persistent references are not allowed in a data file")


def load_pickle(path: Path, extra: Mapping[tuple[str, str], Callable[..., Any]] | None = None) -> Any:
    """The content of a pickle of plain data and arrays; Python 2 strings arrive as bytes.

    Raises:
        DataError: the file is missing, damaged, or asks for anything that is not plain data.
    """
    try:
        with path.open("rb") as file:
            return RestrictedUnpickler(file, extra).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(
            f"{path.name} is not a readable data file: {error or type(error).__name__}",
            looked_at=path,
            next_step="remove the file and fetch the data set again",
        ) from error
