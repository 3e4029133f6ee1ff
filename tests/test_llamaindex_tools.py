"""`DnDFunctionCallingLLM` is a `DnDLLM` that offers tools, reads calls, and drives LlamaIndex's `FunctionAgent`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from helpers import CHAT_TEMPLATE
from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, TextBlock, ToolCallBlock
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llamaindex_parts import METHODS, Recorder, ask, call, events, roomy  # noqa: F401
from paced import Pace, cancel_after, endless, generating, put_adapter, wait_until
from pydantic import BaseModel
from tiny_world import World
from tool_parts import ADD, CALLED, HERMES_TEMPLATE, LLAMA_TEMPLATE, QWEN_TEMPLATE, hermes_call, scripted

from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.integrations.llamaindex import DnDFunctionCallingLLM, DnDLLM
from dnd_sdk.session import DnD

CHATS = [m for m in METHODS if "chat" in m]
CALL = hermes_call(a=2, b=3)
LLAMA_CALL = '{"name": "add", "parameters": {"a": 2, "b": 3}}'


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


TOOL = FunctionTool.from_defaults(add)


@pytest.fixture
def dnd(world: World) -> DnD:
    session = roomy(world.session())
    session.base.tokenizer.chat_template = HERMES_TEMPLATE
    return session


def calls_in(llm: DnDFunctionCallingLLM, response: ChatResponse) -> list[tuple[str, dict[str, Any]]]:
    found = llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
    return [(c.tool_name, c.tool_kwargs) for c in found]


def test_it_is_both_and_adds_no_method_of_its_own(dnd: DnD) -> None:
    llm = DnDFunctionCallingLLM(dnd, adapter=None)
    assert isinstance(llm, DnDLLM) and isinstance(llm, CustomLLM) and isinstance(llm, FunctionCallingLLM)
    assert not set(METHODS) & vars(DnDFunctionCallingLLM).keys()
    assert llm.metadata == DnDLLM(dnd).metadata.model_copy(update={"is_function_calling_model": True})
    data = json.loads(json.dumps(llm.to_dict()))
    assert data["class_name"] == "DnDFunctionCallingLLM"
    assert DnDFunctionCallingLLM.from_dict(data, dnd=dnd).to_dict() == llm.to_dict()


@pytest.mark.parametrize("method", METHODS)
def test_without_tools_it_answers_like_the_other(dnd: DnD, events: Recorder, method: str) -> None:  # noqa: F811
    put_adapter(dnd, "a", seed=1)
    options = {"adapter": "a", "max_tokens": 6, "temperature": 2.0, "seed": 3}
    plain = ask(DnDLLM(dnd), method, "hello", **options)
    first = list(events.seen)
    got = ask(DnDFunctionCallingLLM(dnd), method, "hello", **options)
    assert (got.text, got.raw, got.deltas) == (plain.text, plain.raw, plain.deltas) and got.text
    assert [type(e) for e in events.seen[len(first) :]] == [type(e) for e in first]
    with pytest.raises(ConfigError, match="a call of DnDFunctionCallingLLM has no option 'temprature'"):
        ask(DnDFunctionCallingLLM(dnd), method, "hello", temprature=1)


@pytest.mark.parametrize("method", CHATS)
def test_tools_reach_the_base_with_the_options_of_the_call(dnd: DnD, method: str) -> None:
    put_adapter(dnd, "a", seed=1)
    llm = DnDFunctionCallingLLM(dnd, adapter=None, max_new_tokens=6)
    expected = dnd.complete("hello", "a", tools=[ADD], max_new_tokens=4)
    got = ask(llm, method, "hello", tools=[ADD], adapter="a", max_tokens=4)
    assert (got.text, got.raw["dnd"]["adapter"]) == (expected.text, "a")
    assert got.raw["usage"]["prompt_tokens"] == expected.usage["prompt_tokens"] > len(json.dumps(ADD))
    with pytest.raises(InputError, match="tool 0 is not a"):
        ask(llm, method, "hello", tools=["add"])


@pytest.mark.parametrize("method", CHATS)
@pytest.mark.parametrize("said", [f"Let me see. {CALL} {CALL}", LLAMA_CALL, "<tool_call>{oops</tool_call> ", "Five. "])
def test_calls_leave_the_text_and_come_beside_it(method: str, said: str) -> None:
    llm = DnDFunctionCallingLLM(scripted(said))
    got = ask(llm, method, "2 + 3?", tools=[ADD])
    last = got.items[-1]
    text = {"L": "Let me see.", "{": None}.get(said[0], said)
    assert last.message.content == text
    assert calls_in(llm, last) == [("add", {"a": 2, "b": 3})] * (2 if said[0] == "L" else said[0] == "{")
    ids = [c.tool_id for c in llm.get_tool_calls_from_response(last, error_on_no_tool_call=False)]
    assert len(set(ids)) == len(ids) and all(len(i) == 9 for i in ids)
    if got.deltas is not None:
        assert "".join(d or "" for d in got.deltas) == (text or "")
        assert [i.raw is not None for i in got.items] == [False] * (len(got.items) - 1) + [True]
        assert not any(calls_in(llm, i) for i in got.items[:-1])


@pytest.mark.parametrize("method", CHATS)
def test_one_call_at_a_time_and_none_when_none_were_offered(method: str) -> None:
    llm = DnDFunctionCallingLLM(scripted(CALL + CALL, CALL))
    got = ask(llm, method, "2 + 3?", tools=[ADD], parallel_tool_calls=False)
    assert len(calls_in(llm, got.items[-1])) == 1
    plain = ask(llm, method, "2 + 3?", tools=[])
    assert plain.text == CALL and calls_in(llm, plain.items[-1]) == []


def test_no_call_is_an_error_only_where_it_is_one() -> None:
    llm = DnDFunctionCallingLLM(scripted("Five."))
    answer = llm.chat_with_tools([TOOL], user_msg="2 + 3?")
    assert llm.get_tool_calls_from_response(answer, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match=r"expected at least one tool call, the answer is 'Five\.'"):
        llm.get_tool_calls_from_response(answer)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (None, ["add", "tell"]),
        ("required", ["add", "tell"]),
        ("none", []),
        ("tell", ["tell"]),
        ({"type": "function", "function": {"name": "add"}}, ["add"]),
    ],
)
def test_tool_choice_says_what_is_offered(choice: Any, names: list[str]) -> None:
    dnd = scripted("x")
    tools = [TOOL, FunctionTool.from_defaults(lambda: "x", name="tell", description="y" * 2000)]
    history = [ChatMessage(content="Be brief.", role="system")]
    DnDFunctionCallingLLM(dnd).chat_with_tools(
        tools, user_msg="2 + 3?", chat_history=history, tool_choice=choice, tool_required=True, max_tokens=9
    )
    chat, _, how = dnd.chats[0]
    assert [t["function"]["name"] for t in how["tools"] or ()] == names and how["max_new_tokens"] == 9
    assert [m["content"] for m in chat] == ["Be brief.", "2 + 3?"]
    with pytest.raises(ConfigError, match=r"tool_choice 'ad' is no tool.*\n  fix: use one of auto, .*, tell"):
        DnDFunctionCallingLLM(dnd).chat_with_tools(tools, user_msg="2 + 3?", tool_choice="ad")


def test_a_base_that_renders_no_tools_is_refused_at_once_or_when_it_loads(world: World) -> None:
    dnd = world.session()
    assert dnd.base.tokenizer.chat_template == CHAT_TEMPLATE
    with pytest.raises(ConfigError, match=r"does not render tools.*\n  fix: use DnDLLM with ReActAgent"):
        DnDFunctionCallingLLM(dnd)
    late = DnDFunctionCallingLLM(base=str(world.base), home=str(world.home.root), encoder=str(world.encoder))
    with pytest.raises(ConfigError, match="does not render tools"):
        _ = late.metadata


@pytest.mark.parametrize("template", [HERMES_TEMPLATE, LLAMA_TEMPLATE, QWEN_TEMPLATE], ids=["hermes", "llama", "qwen"])
def test_history_with_calls_and_results_is_rendered(template: str) -> None:
    dnd = scripted("Five.", template=template)
    block = ToolCallBlock(tool_call_id="c1", tool_name="add", tool_kwargs={"a": 2, "b": 3})
    result = ChatMessage(role="tool", content="5", additional_kwargs={"tool_call_id": "c1"})
    said = ChatMessage(role="assistant", blocks=[TextBlock(text="I add."), block])
    DnDFunctionCallingLLM(dnd).chat([ChatMessage("2 + 3?"), said, result], tools=[ADD])
    chat, _, how = dnd.chats[0]
    assert chat[2] == {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "add"}
    text = dnd.base.tokenizer.apply_chat_template(chat, tools=how["tools"], tokenize=False)
    key = "parameters" if template == LLAMA_TEMPLATE else "arguments"
    assert f'{{"name": "add", "{key}": {{"a": 2, "b": 3}}}}' in text and json.dumps(ADD) in text
    with pytest.raises(InputError, match="has a ToolCallBlock, the base reads text only"):
        DnDLLM(dnd).chat([said])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("first", "template"),
    [(f"I add.\n{CALL}", HERMES_TEMPLATE), (LLAMA_CALL, LLAMA_TEMPLATE), (CALL, QWEN_TEMPLATE)],
    ids=["hermes", "llama", "qwen"],
)
def test_function_agent_uses_a_tool(first: str, template: str, streaming: bool) -> None:
    dnd = scripted(first, "It is 5.", template=template)
    used: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        used.append((a, b))
        return a + b

    agent = FunctionAgent(
        tools=[FunctionTool.from_defaults(add)],
        llm=DnDFunctionCallingLLM(dnd),
        streaming=streaming,
        system_prompt="Add.",
    )

    async def run() -> str:
        return str(await agent.run("What is 2 + 3?"))

    assert asyncio.run(run()) == "It is 5." and used == [(2, 3)]
    system, question, called, result = dnd.chats[1][0]
    assert (system["role"], question["content"]) == ("system", "What is 2 + 3?")
    assert called["content"] == ("I add." if "I add" in first else "")
    assert called["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 3}}
    assert (result["role"], result["content"]) == ("tool", "5")
    assert result["tool_call_id"] == called["tool_calls"][0]["id"]


def test_function_agent_on_a_real_tiny_base(dnd: DnD) -> None:
    """A random base calls nothing, so its first answer is the agent's; what it read had the tool in it."""
    llm = DnDFunctionCallingLLM(dnd, adapter=None, max_new_tokens=8)

    async def run() -> str:
        return str(await FunctionAgent(tools=[TOOL], llm=llm).run("What is 2 + 3?"))

    schema = TOOL.metadata.to_openai_tool()
    assert asyncio.run(run()) == dnd.complete("What is 2 + 3?", tools=[schema], max_new_tokens=8).text != ""


def test_qwens_own_template_shows_the_tools_and_what_it_writes_is_read_back(dnd: DnD) -> None:
    tokenizer, question = dnd.base.tokenizer, {"role": "user", "content": "2 + 3?"}
    tokenizer.chat_template = QWEN_TEMPLATE
    read = tokenizer.apply_chat_template([question], tools=[ADD], tokenize=False, add_generation_prompt=True)
    assert f"<tools>\n{json.dumps(ADD)}\n</tools>" in read
    got = ask(DnDFunctionCallingLLM(dnd, adapter=None, max_new_tokens=2), "chat", "2 + 3?", tools=[ADD])
    assert got.raw["usage"]["prompt_tokens"] == len(tokenizer(read)["input_ids"])
    wrote = tokenizer.apply_chat_template([question, CALLED], tokenize=False).rpartition("<|im_start|>assistant\n")[2]
    assert wrote.startswith("<tool_call>\n") and wrote.endswith("\n</tool_call><|im_end|>\n")
    llm = DnDFunctionCallingLLM(scripted(wrote.removesuffix("<|im_end|>\n"), template=QWEN_TEMPLATE))
    assert calls_in(llm, ask(llm, "chat", "2 + 3?", tools=[ADD]).items[-1]) == [("add", {"a": 2, "b": 3})]


class Colour(BaseModel):
    """A colour."""

    name: str
    red: int


def test_structured_output_by_a_tool_and_predict_and_call() -> None:
    said = hermes_call("Colour", name="teal", red=0)
    by_tool = PydanticProgramMode.FUNCTION
    llm = DnDFunctionCallingLLM(scripted(said, said, said, CALL), pydantic_program_mode=by_tool)
    wanted, ask_for = Colour(name="teal", red=0), PromptTemplate("A colour like {what}.")
    assert llm.structured_predict(Colour, ask_for, what="the sea") == wanted
    assert asyncio.run(llm.astructured_predict(Colour, ask_for, what="the sea")) == wanted
    assert llm.as_structured_llm(Colour).complete("A colour.").raw == wanted
    assert str(llm.predict_and_call([TOOL], user_msg="2 + 3?")) == "5"


def test_neither_a_tools_result_nor_a_request_with_tools_is_observed(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("dnd_sdk.session.calls._observed", lambda _, text: seen.append(text))
    llm = DnDFunctionCallingLLM(dnd, observe=True, max_new_tokens=2)
    block = ToolCallBlock(tool_call_id="c1", tool_name="add", tool_kwargs={})
    question, called = ChatMessage("2 + 3?"), ChatMessage(role="assistant", blocks=[block])
    llm.chat([question])
    llm.chat([question], tools=[ADD])
    llm.chat([question, called, ChatMessage(role="tool", content="5")])
    assert seen == ["2 + 3?"]


@pytest.fixture
def slow(dnd: DnD) -> tuple[DnDFunctionCallingLLM, Pace]:
    """An answer without end, token by token."""
    return DnDFunctionCallingLLM(endless(dnd), adapter=None, max_new_tokens=5_000), Pace(dnd.base.model)


def test_closing_a_stream_stops_the_work(slow: tuple[DnDFunctionCallingLLM, Pace]) -> None:
    llm, pace = slow
    pace.allow(3)
    stream = call(llm, "stream_chat", "hello", tools=[ADD])
    next(stream)
    stream.close()
    pace.allow()
    wait_until(lambda: not generating(), "the stream still works")
    assert pace.tokens <= 6


def test_cancelling_a_call_stops_the_work(slow: tuple[DnDFunctionCallingLLM, Pace]) -> None:
    llm, pace = slow
    asyncio.run(cancel_after(2, call(llm, "achat", "hello", tools=[ADD]), pace))
    pace.allow()
    wait_until(lambda: not generating(), "the call still works")
    assert pace.tokens <= 5
