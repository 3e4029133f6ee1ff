"""JSON schemas as callers hand them in, read within limits into one canonical text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dnd_sdk.errors import ConfigError, shown

MAX_SCHEMA_BYTES = 64 * 1024
"""Of the canonical text: what a library builds from a schema grows with it."""
MAX_SCHEMA_DEPTH = 64
"""Objects and lists inside each other: parsers recurse."""

_ACCEPTED = "a JSON schema: a dict, its JSON text, or a pydantic model class"
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def checked_schema(value: object) -> str:
    """The canonical JSON text of a schema; the order of its keys, which an answer follows, is kept.

    `value` is a mapping, JSON text, or a class with `model_json_schema`, whose objects take no other fields than the
    class names unless it says so. Raises `ConfigError` for anything else and for what is larger than
    `MAX_SCHEMA_BYTES` or deeper than `MAX_SCHEMA_DEPTH`. Whether a schema can be enforced, the engine finds.
    """
    schema = _read(value)
    if not isinstance(schema, Mapping):
        raise ConfigError(f"schema must be {_ACCEPTED}, got {shown(schema)}")
    text = _text(dict(schema))
    if any(place.count("/") > MAX_SCHEMA_DEPTH for place, _ in schema_places(schema)):
        raise _too_deep()
    if "x-guidance" in schema:  # the library takes its own options from there
        raise ConfigError("schema must not hold x-guidance at /x-guidance", fix="leave that key out")
    return text


def closed_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with no further fields in its objects than it names, unless it says so: who reads them ignores others."""
    copied: dict[str, Any] = json.loads(json.dumps(schema))
    for _, value in list(schema_places(copied)):
        if isinstance(value, dict) and value.get("type") == "object" and isinstance(value.get("properties"), dict):
            value.setdefault("additionalProperties", False)
    return copied


def schema_places(schema: object) -> Iterator[tuple[str, Any]]:
    """(JSON pointer, value) of everything in a schema, outer before inner."""
    todo: list[tuple[str, Any]] = [("", schema)]
    while todo:
        place, value = todo.pop()
        yield place, value
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        todo.extend((f"{place}/{_escaped(key)}", item) for key, item in reversed(list(inner)))


def _escaped(key: object) -> str:
    return str(key).replace("~", "~0").replace("/", "~1")


def _read(value: object) -> object:
    if isinstance(value, str):
        return _parsed(value)
    describe = getattr(value, "model_json_schema", None)
    if describe is None:
        return value
    try:
        return closed_schema(describe())
    except Exception as e:  # a field that JSON has no type for, or what the class itself raises
        raise ConfigError(f"schema: {shown(value)} cannot be described as a JSON schema: {e}") from e


def _parsed(text: str) -> object:
    if len(text) > MAX_SCHEMA_BYTES:
        raise _too_large()
    try:
        return json.loads(text)
    except RecursionError as e:
        raise _too_deep() from e
    except ValueError as e:
        raise ConfigError(f"schema must be {_ACCEPTED}, got text that is no JSON: {e}") from e


def _text(schema: dict[Any, Any]) -> str:
    pieces, size = [], 0
    try:
        for piece in _ENCODER.iterencode(schema):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_SCHEMA_BYTES:
                raise _too_large()
    except RecursionError as e:
        raise _too_deep() from e
    except (TypeError, ValueError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"schema must be {_ACCEPTED}, got what JSON cannot hold: {e}") from e
    return "".join(pieces)


def _too_large() -> ConfigError:
    return ConfigError(
        f"schema is larger than {MAX_SCHEMA_BYTES} bytes as JSON", fix="ask for less at once, or share parts by $ref"
    )


def _too_deep() -> ConfigError:
    return ConfigError(f"schema is nested deeper than {MAX_SCHEMA_DEPTH} levels", fix="flatten it, or use $ref")
