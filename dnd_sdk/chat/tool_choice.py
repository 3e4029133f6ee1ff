"""Which tools a request offers, and the schema that makes the model call one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dnd_sdk.chat.schema import closed_schema, schema_places
from dnd_sdk.chat.template import Tools, checked_tools
from dnd_sdk.errors import ConfigError

_FREE, _FORCED, _NONE = (None, "auto"), ("any", "required", True), ("none", False)


class ToolOffer(NamedTuple):
    """What a request offers."""

    tools: list[dict[str, Any]]
    """Those the model is shown; empty: none."""
    must_call: bool
    """Whether the answer has to be a call of one of them."""


def choose_tools(tools: Tools, choice: object) -> ToolOffer:
    """The offer under a `tool_choice`: None or "auto", "any" or "required" or True, "none" or False, a tool's name.

    A name may also come as OpenAI or Anthropic wrap it. Raises `ConfigError` for a name that is not on offer,
    `InputError` for tools that are malformed.
    """
    offered = checked_tools(tools)
    name = _named(choice)
    if _is_one_of(name, _NONE):
        return ToolOffer([], False)
    if _is_one_of(name, _FREE) or _is_one_of(name, _FORCED):
        return ToolOffer(offered, _is_one_of(name, _FORCED) and bool(offered))
    chosen = [t for t in offered if t["function"]["name"] == name]
    if not chosen:
        names = [t["function"]["name"] for t in offered]
        raise ConfigError(
            f"tool_choice {choice!r} is no tool on offer",
            fix=f"use one of {', '.join(['auto', 'none', 'required', *names])}",
        )
    return ToolOffer(chosen, True)


def call_schema(tools: Tools) -> dict[str, Any]:
    """A JSON schema whose answers each are a call of one of the tools, in the bare form that `read_answer` reads."""
    return {"anyOf": [_call(t["function"], f"#/anyOf/{i}/properties/arguments") for i, t in enumerate(tools)]}


def _call(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": _arguments(function, place)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _arguments(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The schema of the function's arguments as it reads at `place`, a JSON pointer: its references are from there."""
    schema = closed_schema({"type": "object", "properties": {}} | dict(function.get("parameters") or {}))
    for holder, target in _references(schema):
        holder["$ref"] = place + target[1:]
    return schema


def _references(schema: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for _, value in schema_places(schema):
        if isinstance(value, dict) and isinstance(value.get("$ref"), str) and value["$ref"].startswith("#"):
            yield value, value["$ref"]


def _named(choice: object) -> object:
    if not isinstance(choice, Mapping):
        return choice
    inner = choice.get("function")
    return inner.get("name") if isinstance(inner, Mapping) else choice.get("name", choice.get("type"))


def _is_one_of(name: object, words: Sequence[object]) -> bool:
    return any(name is word or (isinstance(name, str) and name == word) for word in words)
