"""Schemas as callers hand them in: one canonical text, or a refusal that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from dnd_sdk.chat import checked_schema, schema_places
from dnd_sdk.chat.schema import MAX_SCHEMA_BYTES
from dnd_sdk.errors import ConfigError


class Line(BaseModel):
    properties: int
    type: str = "x"


class Order(BaseModel):
    model_config = ConfigDict(extra="allow")
    lines: list[Line]


class Odd(BaseModel):
    call: Callable[[], int]


def test_every_form_gives_the_same_text_and_keeps_the_order() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {"const": "ü"}}}
    text = checked_schema(schema)
    assert text == '{"type":"object","properties":{"b":{},"a":{"const":"\\u00fc"}}}'
    assert {checked_schema(s) for s in (json.dumps(schema, indent=3), text, MappingProxyType(schema))} == {text}


def test_a_model_class_takes_no_other_fields_unless_it_says_so() -> None:
    schema = json.loads(checked_schema(Order))
    assert schema["additionalProperties"] is True
    line = schema["$defs"]["Line"]
    assert line["additionalProperties"] is False and line["properties"].keys() == {"properties", "type"}
    assert "additionalProperties" not in checked_schema({"type": "object", "properties": {}})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "must be"),
        ([], "must be"),
        (True, "must be"),
        ("true", "must be"),
        (3, "got 3"),
        ("{", "no JSON"),
        ({"const": float("nan")}, "cannot hold"),
        ({"const": {1, 2}}, "cannot hold"),
        (Odd, "cannot be described"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        (" " * (MAX_SCHEMA_BYTES + 1), "larger than"),
    ],
)
def test_what_is_no_schema_is_refused(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked_schema(value)


def test_endless_and_circular_values_are_refused() -> None:
    circle: dict[str, Any] = {}
    circle["a"] = circle
    for value in (circle, {"enum": ["x" * 50] * 10**6}):
        with pytest.raises(ConfigError):
            checked_schema(value)


def test_places_are_json_pointers() -> None:
    assert list(schema_places({"a/b": [{"~": 1}]})) == [
        ("", {"a/b": [{"~": 1}]}),
        ("/a~1b", [{"~": 1}]),
        ("/a~1b/0", {"~": 1}),
        ("/a~1b/0/~0", 1),
    ]
