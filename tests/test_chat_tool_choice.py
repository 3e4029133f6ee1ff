"""Which tools a request offers under a `tool_choice`, and the schema whose answers are calls."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from tool_parts import ADD

from dnd_sdk.chat import call_schema, choose_tools, read_answer
from dnd_sdk.errors import ConfigError, InputError

TELL: dict[str, Any] = {"type": "function", "function": {"name": "tell"}}


@pytest.mark.parametrize(
    ("choice", "names", "must_call"),
    [
        (None, ["add", "tell"], False),
        ("auto", ["add", "tell"], False),
        ({"type": "auto"}, ["add", "tell"], False),
        ("any", ["add", "tell"], True),
        ("required", ["add", "tell"], True),
        (True, ["add", "tell"], True),
        ({"type": "any"}, ["add", "tell"], True),
        ("none", [], False),
        (False, [], False),
        ("tell", ["tell"], True),
        ({"type": "function", "function": {"name": "tell"}}, ["tell"], True),
        ({"type": "tool", "name": "add"}, ["add"], True),
    ],
)
def test_a_choice_says_what_is_offered_and_whether_it_must_be_called(
    choice: Any, names: list[str], must_call: bool
) -> None:
    offer = choose_tools([ADD, TELL], choice)
    assert [t["function"]["name"] for t in offer.tools] == names and offer.must_call is must_call


@pytest.mark.parametrize("choice", ["ad", 1, 3.0, {"type": "function", "function": {"name": "ad"}}, ["add"]])
def test_a_choice_that_is_no_tool_is_refused(choice: Any) -> None:
    with pytest.raises(ConfigError, match=r"is no tool on offer\n  fix: use one of auto, none, required, add, tell"):
        choose_tools([ADD, TELL], choice)


def test_nothing_can_be_forced_where_nothing_is_offered() -> None:
    assert choose_tools([], "any") == ([], False)
    with pytest.raises(InputError, match="tool 0 is not a"):
        choose_tools(["add"], None)  # type: ignore[list-item]


def test_the_schema_of_calls_names_the_tool_and_closes_its_arguments() -> None:
    given = deepcopy([ADD, TELL])
    first, second = call_schema(given)["anyOf"]
    assert given == [ADD, TELL]
    assert first["properties"]["name"] == {"const": "add"} and first["required"] == ["name", "arguments"]
    assert first["properties"]["arguments"] == {**ADD["function"]["parameters"], "additionalProperties": False}
    assert second["properties"]["arguments"]["properties"] == {}
    assert read_answer('{"name": "tell", "arguments": {}}', given).calls == (("tell", {}),)


def test_references_point_to_where_the_arguments_went() -> None:
    parameters = {
        "properties": {"at": {"$ref": "#/$defs/at"}, "$ref": {"type": "string"}},
        "$defs": {"at": {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": True}},
    }
    go = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    arguments = call_schema([ADD, go])["anyOf"][1]["properties"]["arguments"]
    assert arguments["properties"]["at"]["$ref"] == "#/anyOf/1/properties/arguments/$defs/at"
    assert arguments["$defs"]["at"]["properties"]["next"]["$ref"] == "#/anyOf/1/properties/arguments"
    assert arguments["$defs"]["at"]["additionalProperties"] is True and arguments["additionalProperties"] is False
