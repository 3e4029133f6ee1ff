"""Arguments of a call in the types that the tool's schema names: models, small ones above all, write `"2"` for a 2."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnd_sdk.chat.template import Tools

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}
"""JSON schema's names of what JSON is read as."""

Parameters = Mapping[str, Any]
"""The schema of each of a tool's parameters, by its name."""


def parameters_by_tool(tools: Tools) -> dict[str, Parameters]:
    """The parameters of each tool by the tool's name; what is no schema, which the engine refuses, is left out."""
    functions = [_entry(tool, "function") for tool in tools]
    return {
        f["name"]: _entry(_entry(f, "parameters"), "properties") for f in functions if isinstance(f.get("name"), str)
    }


def typed(arguments: Mapping[str, Any], parameters: Parameters) -> dict[str, Any]:
    """The arguments, those that are written in another type than their schema's read as that; others as they are."""
    return {name: _typed(value, tuple(_allowed(parameters.get(name)))) for name, value in arguments.items()}


def _entry(described: object, key: str) -> Mapping[str, Any]:
    found = described.get(key) if isinstance(described, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _allowed(schema: object) -> Iterator[str]:
    """Names of the types a schema allows, by itself or as one of several; none: any."""
    if not isinstance(schema, Mapping):
        return
    named, others = schema.get("type"), schema.get("anyOf")
    yield from (t for t in (named if isinstance(named, list) else [named]) if isinstance(t, str) and t in _TYPES)
    for other in others if isinstance(others, list) else ():
        yield from _allowed(other)


def _typed(value: Any, allowed: tuple[str, ...]) -> Any:
    if any(_is_a(value, t) for t in allowed):
        return value
    read = _read(value) if isinstance(value, str) else None
    if any(_is_a(read, t) for t in allowed if t != "null"):
        return read
    return json.dumps(value) if "string" in allowed and _is_a(value, "number") else value


def _is_a(value: Any, name: str) -> bool:
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return name == "boolean" and isinstance(value, bool)  # to Python a bool is an int
    return isinstance(value, _TYPES[name])


def _read(text: str) -> Any:
    """The JSON value that a text is, `True` and `False` also as Python writes them; None for what is none."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return None
