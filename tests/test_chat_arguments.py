"""Arguments take the type of their schema when they say it in another one, and stay as they are when they do not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnd_sdk.chat.arguments import parameters_by_tool, typed

INTEGER, NUMBER, TEXT = {"type": "integer"}, {"type": "number"}, {"type": "string"}
MAYBE = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
"""As pydantic writes `int | None`."""


@pytest.mark.parametrize(
    ("given", "schema", "expected"),
    [
        ("17", INTEGER, 17),
        (" -17\n", INTEGER, -17),
        ("2.5", NUMBER, 2.5),
        ("50", NUMBER, 50),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ("17", MAYBE, 17),
        ("17", {"type": ["null", "integer"]}, 17),
        (551, TEXT, "551"),
        (1.5, TEXT, "1.5"),
    ],
)
def test_a_value_in_another_type_is_read(given: Any, schema: Any, expected: Any) -> None:
    got = typed({"x": given}, {"x": schema})["x"]
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        (17, INTEGER),
        (17, NUMBER),
        (None, MAYBE),
        ("17", {"anyOf": [INTEGER, TEXT]}),
        ("17", {"anyOf": [TEXT, INTEGER]}),
        ("17", {}),
        ("17", {"type": "any"}),
        ("17", None),
        ("17", {"type": {"odd": 1}, "anyOf": "odd"}),
        ("half an hour", INTEGER),
        ("2.5", INTEGER),
        ("true", INTEGER),
        ("1", {"type": "boolean"}),
        ("NaN", NUMBER),
        ("1e999", NUMBER),
        ("9" * 5_000, INTEGER),
        ("[" * 200_000, {"type": "array"}),
        ("null", MAYBE),
        ("{", {"type": "object"}),
        (True, INTEGER),
        (True, TEXT),
        (float("nan"), TEXT),
        ([1], TEXT),
        (None, TEXT),
    ],
    ids=lambda v: str(v)[:30],
)
def test_anything_else_stays(given: Any, schema: Any) -> None:
    got = typed({"x": given}, {"x": schema, "y": INTEGER})
    assert list(got) == ["x"] and got["x"] is given


JSON_SCHEMAS = st.sampled_from([INTEGER, NUMBER, TEXT, MAYBE, {"type": "boolean"}, {"type": "array"}, {}])
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers())


@given(VALUES, JSON_SCHEMAS)
def test_typing_twice_changes_nothing_more(value: Any, schema: Any) -> None:
    once = typed({"x": value}, {"x": schema})
    assert repr(typed(once, {"x": schema})) == repr(once)


def test_parameters_are_found_and_what_is_no_schema_has_none() -> None:
    whole = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": INTEGER}}}}
    odd = [7, {}, {"function": 7}, {"function": {"name": 7}}, {"function": {"name": "f", "parameters": [1]}}]
    assert parameters_by_tool([whole, *odd]) == {"add": {"a": INTEGER}, "f": {}}  # type: ignore[list-item]
