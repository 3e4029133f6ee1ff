"""`DnDChat` offers tools and reads their calls, holds answers to schemas, and drives LangGraph's agents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from helpers import CHAT_TEMPLATE
from llamaindex_parts import roomy
from paced import put_adapter
from pydantic import BaseModel, Field
from test_langchain import WAYS
from tiny_world import World
from tool_parts import ADD, HERMES_TEMPLATE, hermes_call
from typing_extensions import TypedDict

from dnd_sdk.engine import CompletionRequest
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.session import DnD

pytest.importorskip("langchain_core")

from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.output_parsers import PydanticToolsParser
from langchain_core.tools import tool

from dnd_sdk.integrations.langchain import DnDChat

CALL = hermes_call(a=2, b=3)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Turn(BaseModel):
    """Bounded, so that a random base comes to an end."""

    to: Literal["left", "right"]
    by: int = Field(ge=1, le=9)


@pytest.fixture
def dnd(world: World) -> DnD:
    session = roomy(world.session())
    session.base.tokenizer.chat_template = HERMES_TEMPLATE
    return session


def script(world: World, *texts: str) -> DnD:
    """A session that says these texts, one after the other."""
    left = list(texts)
    return world.elsewhere(lambda request: left.pop(0))


def asked(dnd: DnD) -> list[CompletionRequest]:
    return dnd.engine.requests  # type: ignore[attr-defined]


def calls(message: AIMessage) -> list[tuple[str, dict[str, Any]]]:
    return [(c["name"], c["args"]) for c in message.tool_calls]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("said", [f"Let me see. {CALL} {CALL}", CALL, "<tool_call>{oops</tool_call> ", "Five. "])
def test_calls_leave_the_text_and_come_beside_it(world: World, way: str, said: str) -> None:
    dnd = script(world, said, said)
    got = WAYS[way](DnDChat(dnd, max_tokens=500).bind_tools([add]), "2 + 3?")
    n = said.count("</tool_call>") if "oops" not in said else 0
    assert calls(got) == [("add", {"a": 2, "b": 3})] * n and not got.invalid_tool_calls
    assert got.text == {"L": "Let me see."}.get(said[0], "" if n else said)
    ids = [c["id"] for c in got.tool_calls]
    assert len(set(ids)) == n and all(ids)
    [shown, *_] = asked(dnd)[0].tools or ()
    assert shown["function"]["name"] == "add" and "a" in shown["function"]["parameters"]["properties"]
    assert asked(dnd)[0].adapter_id is None, "with tools on offer auto is the base"


def test_what_may_yet_be_a_call_is_held_back(world: World) -> None:
    chunks = list(DnDChat(script(world, f"I add. {CALL}"), max_tokens=500).bind_tools([add]).stream("2 + 3?"))
    assert "".join(c.text for c in chunks) == "I add."
    assert [bool(c.tool_call_chunks) for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert json.loads(chunks[-1].tool_call_chunks[0]["args"]) == {"a": 2, "b": 3}


def test_one_call_at_a_time_and_none_without_tools(world: World) -> None:
    chat = DnDChat(script(world, CALL + CALL, CALL, CALL), max_tokens=500)
    assert len(chat.bind_tools([add], parallel_tool_calls=False).invoke("2 + 3?").tool_calls) == 1
    assert chat.invoke("2 + 3?").text == CALL
    assert chat.bind_tools([add], tool_choice="none").invoke("2 + 3?").text == CALL
    assert [bool(r.tools) for r in asked(chat.dnd)] == [True, False, False]


def test_an_adapter_that_is_named_answers_with_tools_too(dnd: DnD) -> None:
    put_adapter(dnd, "mine", seed=1)
    chat = DnDChat(dnd, adapter="mine", max_tokens=6).bind_tools([ADD])
    expected = dnd.complete("hello", "mine", tools=[ADD], max_new_tokens=6)
    got = chat.invoke("hello")
    assert (got.text, got.response_metadata["adapter"]) == (expected.text, "mine")
    assert got.usage_metadata["input_tokens"] == expected.usage["prompt_tokens"] > len(json.dumps(ADD))


@pytest.mark.parametrize("way", WAYS)
def test_a_call_can_be_forced_on_any_base(dnd: DnD, way: str) -> None:
    chat = DnDChat(dnd, adapter=None, max_tokens=120)
    for choice in ("any", "Turn"):
        got = WAYS[way](chat.bind_tools([Turn, Turn], tool_choice=choice), "hello")
        [(name, arguments)] = calls(got)
        assert name == "Turn" and Turn(**arguments) and got.text == ""
    with pytest.raises(ConfigError, match="held to a schema or to be a tool's call, not to both"):
        WAYS[way](chat.bind_tools([Turn], tool_choice="any"), "hello", schema=Turn)


def test_bad_choices_and_bases_that_show_no_tools_are_refused_at_once(dnd: DnD) -> None:
    with pytest.raises(ConfigError, match=r"tool_choice 'ad' is no tool on offer\n  fix: use one of .*, add"):
        DnDChat(dnd).bind_tools([add], tool_choice="ad")
    dnd.base.tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(ConfigError, match="does not render tools"):
        DnDChat(dnd).bind_tools([add])


class TurnDict(TypedDict):
    """The same as a TypedDict."""

    to: Annotated[Literal["left", "right"], ..., "Where to."]
    by: Annotated[Literal[1, 2, 3], ..., "By how much."]


SCHEMAS: dict[str, Any] = {
    "class": Turn,
    "TypedDict": TurnDict,
    "schema": Turn.model_json_schema(),
    "bare schema": {k: v for k, v in Turn.model_json_schema().items() if k != "title"},
    "tool": {"name": "turn", "description": "x", "parameters": Turn.model_json_schema()},
}


@pytest.mark.parametrize(
    ("method", "of"),
    [
        (m, s)
        for m in ("json_schema", "function_calling")
        for s in SCHEMAS
        if (m, s) != ("function_calling", "bare schema")
    ],
)
def test_structured_answers_fit_on_any_base(dnd: DnD, method: Any, of: str) -> None:
    schema = SCHEMAS[of]
    chat = DnDChat(dnd, adapter=None, max_tokens=120).with_structured_output(schema, method=method)
    whole = chat.invoke("hello")
    assert isinstance(whole, Turn) if schema is Turn else Turn(**whole)
    assert asyncio.run(chat.ainvoke("hello")) == whole == list(chat.stream("hello"))[-1]
    assert chat.batch(["hello"]) == [whole]


def test_a_stream_of_structured_answers_grows(dnd: DnD) -> None:
    chat = DnDChat(dnd, adapter=None, max_tokens=120).with_structured_output(TurnDict)
    grown = list(chat.stream("hello"))
    assert len(grown) > 2 and grown[0] == {} and grown[-1].keys() == {"to", "by"}


def test_any_object_and_the_raw_message(world: World) -> None:
    chat = DnDChat(script(world, '{"to": "left", "by": 3}', '{"to": "up"}'), max_tokens=99)
    turn = chat.with_structured_output(Turn, method="json_mode", include_raw=True)
    first, second = turn.invoke("hello"), turn.invoke("hello")
    assert first["parsed"] == Turn(to="left", by=3) and first["raw"].text and first["parsing_error"] is None
    assert second["parsed"] is None and "up" in str(second["parsing_error"])
    assert json.loads(str(asked(chat.dnd)[0].options.schema))["type"] == "object"


@pytest.mark.parametrize("schema", [Turn, TurnDict], ids=["class", "TypedDict"])
def test_an_answer_that_is_cut_is_an_error_and_no_half_object(dnd: DnD, schema: Any) -> None:
    chat = DnDChat(dnd, adapter=None, max_tokens=9)
    held = chat.with_structured_output(schema)
    reads: list[Callable[[], Any]] = [lambda: held.invoke("hello"), lambda: list(held.stream("hello"))]
    for read in [*reads, lambda: asyncio.run(held.ainvoke("hello"))]:
        with pytest.raises(InputError, match="max_new_tokens=9 cut the answer"):
            read()
    with pytest.raises(InputError, match="max_new_tokens=9 cut the answer"):
        chat.with_structured_output(schema, method="function_calling").invoke("hello")
    raw = chat.with_structured_output(schema, include_raw=True).invoke("hello")
    assert raw["parsed"] is None and isinstance(raw["parsing_error"], InputError) and len(raw["raw"].text) <= 9


@pytest.mark.parametrize(
    ("schema", "options", "match"),
    [
        ({"type": "string", "format": "weird"}, {}, "Unknown format"),
        (Turn, {"method": "xml"}, "method must be json_schema, function_calling or json_mode"),
        (Turn, {"temprature": 1}, "has no option 'temprature'"),
    ],
)
def test_what_cannot_be_held_is_refused(dnd: DnD, schema: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DnDChat(dnd, adapter=None).with_structured_output(schema, **options).invoke("hello")


def agents() -> dict[str, Callable[..., Any]]:
    """LangGraph's agent under its old name and its new one, as far as they are installed."""
    found: dict[str, Callable[..., Any]] = {}
    try:
        from langgraph.prebuilt import create_react_agent

        found["langgraph"] = create_react_agent
        from langchain.agents import create_agent

        found["langchain"] = create_agent
    except ImportError:
        pass
    return found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("which", ["langgraph", "langchain"])
def test_an_agent_uses_a_tool(world: World, which: str, streaming: bool) -> None:
    if which not in agents():
        pytest.skip(f"{which} is not installed")
    dnd = script(world, f"I add. {CALL}", "It is 5.")
    agent = agents()[which](DnDChat(dnd), [add])
    question = {"messages": [("user", "What is 2 + 3?")]}
    if streaming:
        pieces = [p for p, _ in agent.stream(question, stream_mode="messages")]
        assert "".join(p.text for p in pieces if not isinstance(p, ToolMessage)) == "I add.It is 5."
    else:
        assert asyncio.run(agent.ainvoke(question))["messages"][-1].text == "It is 5."
    user, said, result = asked(dnd)[1].chat
    assert (user["content"], said["content"], result["content"]) == ("What is 2 + 3?", "I add.", "5")  # type: ignore[index]
    assert said["tool_calls"][0]["function"]["arguments"] == {"a": 2, "b": 3}  # type: ignore[index]
    assert result["tool_call_id"] == said["tool_calls"][0]["id"] and result["name"] == "add"  # type: ignore[index]


def test_an_agents_structured_answer_is_held(dnd: DnD) -> None:
    if "langchain" not in agents():
        pytest.skip("langchain is not installed")
    agent = agents()["langchain"](DnDChat(dnd, adapter=None, max_tokens=120), [], response_format=Turn)
    assert isinstance(agent.invoke({"messages": [("user", "Where?")]})["structured_response"], Turn)


def test_calls_are_read_by_langchains_own_parser(dnd: DnD) -> None:
    chat = DnDChat(dnd, adapter=None, max_tokens=120).bind_tools([Turn], tool_choice="any")
    [turn] = (chat | PydanticToolsParser(tools=[Turn])).invoke("hello")
    assert isinstance(turn, Turn)
