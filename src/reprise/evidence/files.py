"""Reading YAML strictly, naming file and key in every complaint; writing text and JSON atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from reprise.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

Model = TypeVar("Model", bound="BaseModel")
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is about eight times faster


class _StrictLoader(_Base):
    """A safe loader that refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The parsed file.

    Raises:
        ConfigError: the file is missing or is not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ConfigError(
            f"{path.name} is missing.", looked_at=path, next_step="`reprise new-paper` shows one"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not valid YAML: {error}", looked_at=path) from None


def read_model(path: Path, model: type[Model]) -> Model:
    """The file as a checked model.

    Raises:
        ConfigError: one line for each wrong key, with its place in the file.
    """
    from pydantic import ValidationError

    content = read_yaml(path)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [f"  {_place(item['loc'])}: {_explain(item)}" for item in error.errors()]
        raise ConfigError(
            f"{path.parent.name}/{path.name} is not right:\n" + "\n".join(lines),
            looked_at=path,
            next_step="docs/architecture.md lists the fields",
        ) from None


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "(whole file)"


def _explain(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown key"
    if item["type"] == "missing":
        return "missing"
    given = item.get("input")
    shown = f" (found {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    return f"{item['msg'].removeprefix('Value error, ')}{shown}"


def read_json(path: Path) -> Any:
    """The parsed file, or None when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write indented JSON atomically; numbers that are not finite are an error."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
