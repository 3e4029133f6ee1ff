"""`DnDModel` keeps the contract of a smolagents model and drives its agents; the example runs."""

from __future__ import annotations

import importlib
import json
import re
import sys
from functools import partial
from typing import Any

import pytest
from llamaindex_parts import ScriptedStream, roomy
from paced import Pace, endless, generating, put_adapter, wait_until
from smolagents import CodeAgent, LogLevel, Model, ToolCallingAgent, tool
from smolagents.default_tools import FinalAnswerTool
from smolagents.models import ChatMessage, MessageRole
from test_examples import load
from test_llamaindex_examples import shown
from tiny_world import World, prompts_of
from tool_parts import HERMES_TEMPLATE, QWEN_TEMPLATE, hermes_call

from dnd_sdk.chat.template import prompt_ids
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError, MissingExtraError
from dnd_sdk.integrations.smolagents import DnDModel
from dnd_sdk.models import SMALL_BASE
from dnd_sdk.session import Completion, DnD

QUIET = LogLevel.OFF


@pytest.fixture
def dnd(world: World) -> DnD:
    return roomy(world.session())


def says(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.fixture
def script(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Answers to give, first one first; the session notes what it was asked in `asked`."""
    texts: list[str] = []
    monkeypatch.setattr(dnd, "asked", [], raising=False)

    def complete(chat: Any, adapter: Any, **how: Any) -> Completion:
        dnd.asked.append((chat, adapter, how))
        text = texts.pop(0)
        cut = min((text.find(s) for s in how["stop"] if s in text), default=len(text))
        return Completion(text[:cut], {"prompt_tokens": 7, "completion_tokens": 3}, None, "base")

    monkeypatch.setattr(dnd, "complete", complete)
    return texts


@tool
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: One.
        b: The other.
    """
    return a + b


def test_an_answer_is_the_sessions_with_its_usage(dnd: DnD) -> None:
    put_adapter(dnd, "mine", seed=1)
    expected = dnd.complete("hello", "mine", max_new_tokens=8)
    model = DnDModel(dnd, "mine", max_new_tokens=8)
    assert isinstance(model, Model) and model.model_id == dnd.base.name
    for message in (says("hello"), {"role": "user", "content": "hello"}, ChatMessage(MessageRole.USER, "hello")):
        got = model([message])
        assert (got.role, got.content) == (MessageRole.ASSISTANT, expected.text) and got.content
        assert (got.token_usage.input_tokens, got.token_usage.output_tokens) == tuple(expected.usage.values())
        assert got.raw == {"adapter": "mine", "decision": expected.decision}
    assert DnDModel(dnd, None, max_new_tokens=8)([says("hello")]).content != expected.text


def test_stop_sequences_and_options_reach_the_engine(dnd: DnD) -> None:
    model = DnDModel(endless(dnd), None)
    whole = model.generate([says("hello")], max_tokens=20).content
    cut = whole[4:6]
    assert model.generate([says("hello")], stop_sequences=["never", cut], max_tokens=20).content == whole.split(cut)[0]
    warm = {"temperature": 2.0, "seed": 3, "max_new_tokens": 9}
    assert DnDModel(dnd, None, **warm)([says("hello")]).content == dnd.complete("hello", **warm).text
    own = DnDModel(dnd, None, max_new_tokens=3).generate([says("hello")], max_new_tokens=9)
    assert own.token_usage.output_tokens == 3, "a model's own options win, in smolagents"


def test_a_stream_is_the_same_answer_and_stops_when_closed(dnd: DnD) -> None:
    model = DnDModel(endless(dnd), None, max_new_tokens=12)
    whole = model.generate([says("hello")])
    deltas = list(model.generate_stream([says("hello")]))
    assert "".join(d.content for d in deltas) == whole.content and len(deltas) > 3
    assert [d.token_usage for d in deltas] == [None] * (len(deltas) - 1) + [whole.token_usage]
    pace = Pace(dnd.base.model)
    pace.allow(3)
    stream = DnDModel(dnd, None, max_new_tokens=5_000).generate_stream([says("hello")])
    next(stream)
    stream.close()
    pace.allow()
    wait_until(lambda: not generating(), "the stream still works")
    assert pace.tokens <= 6


def test_messages_become_the_chat_a_base_knows(dnd: DnD, script: list[str]) -> None:
    script.append("x")
    roles = ("system", "user", "tool-call", "tool-response", "user")
    DnDModel(dnd, None)([says(" ", "system"), *(says(f"{i}", role) for i, role in enumerate(roles[1:], start=1))])
    assert dnd.asked[0][0] == [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3\n4"},
    ]
    with pytest.raises(InputError, match="message 1 has a part of type 'image', the base reads text only"):
        DnDModel(dnd)([says("a"), {"role": "user", "content": [{"type": "image", "image": None}]}])


def test_auto_is_routed_by_the_task_and_not_by_what_a_tool_returned(world: World) -> None:
    dnd = roomy(world.session(reuse=0.98))
    dnd.adapt(prompts_of("lower"), name="cats")
    model = DnDModel(dnd, max_new_tokens=3)
    task, result = says("the cat 7 sat on it"), says("0123456789 ** 99 !!", "tool-response")
    assert model([task, says("calling", "tool-call"), result]).raw["adapter"] == "cats"
    assert model([says("0123456789 ** 99 !!")]).raw["adapter"] is None
    assert model([says(" ")]).raw["adapter"] is None
    assert model([task], tools_to_call_from=[add]).raw["adapter"] == "cats", "its template shows no tools"
    dnd.base.tokenizer.chat_template = HERMES_TEMPLATE
    assert model([task], tools_to_call_from=[add]).raw["adapter"] is None
    assert model([says(" ")], tools_to_call_from=[add]).raw["adapter"] is None
    assert DnDModel(dnd, "cats", max_new_tokens=3)([task], tools_to_call_from=[add]).raw["adapter"] == "cats"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temprature": 1}, r"DnDModel has no option 'temprature'.*\n  fix: use temperature"),
        ({"top_p": 7}, "top_p must"),
    ],
)
def test_bad_options_are_refused(dnd: DnD, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DnDModel(dnd, **options)
    with pytest.raises(ConfigError, match=match):
        DnDModel(dnd)([says("a")], **options)
    with pytest.raises(ConfigError, match="structured output is not supported"):
        DnDModel(dnd)([says("a")], response_format={"type": "json_object"})


def test_tools_are_rendered_where_the_base_can(dnd: DnD, script: list[str]) -> None:
    script += ["x", "x"]
    model = DnDModel(dnd, None)
    model([says("a")], tools_to_call_from=[add])
    dnd.base.tokenizer.chat_template = HERMES_TEMPLATE
    model([says("a")], tools_to_call_from=[add])
    first, second = (how["tools"] for *_, how in dnd.asked)
    assert first is None and [t["function"]["name"] for t in second] == ["add"]


@pytest.mark.parametrize("streaming", [False, True])
def test_calls_come_beside_the_answer_typed_as_the_tool_wants(
    dnd: DnD, script: list[str], monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    fenced = '```json\n{"name": "add", "arguments": {"a": "2", "b": 3}}\n```'
    script += [fenced, json.dumps({"name": "final_answer", "arguments": {"answer": 5}})]
    monkeypatch.setattr(dnd, "stream", lambda *asked, **how: ScriptedStream(dnd.complete(*asked, **how).text))
    agent = ToolCallingAgent([add], DnDModel(dnd, None), verbosity_level=QUIET, stream_outputs=streaming)
    assert agent.run("What is 2 + 3?") == 5 and "Observation:\n5" in dnd.asked[1][0][-1]["content"]


CALLS = {
    "hermes": hermes_call(a=2, b=3),
    "llama": '{"name": "add", "parameters": {"a": 2, "b": 3}}',
    "smolagents": 'Action:\n{"name": "add", "arguments": {"a": 2, "b": 3}}',
}


@pytest.mark.parametrize("said", CALLS.values(), ids=CALLS)
def test_a_tool_calling_agent_uses_a_tool(dnd: DnD, script: list[str], said: str) -> None:
    script += [said, json.dumps({"name": "final_answer", "arguments": {"answer": "It is 5."}})]
    agent = ToolCallingAgent([add], DnDModel(dnd, None), verbosity_level=QUIET)
    assert agent.run("What is 2 + 3?") == "It is 5."
    chat, _, how = dnd.asked[1]
    assert "Observation:\n5" in chat[-1]["content"] and set(how["stop"]) >= {"Observation:", "Calling tools:"}
    assert agent.monitor.get_total_token_counts().input_tokens == 14


def test_an_agent_on_qwens_own_template_reads_its_tools_and_their_results(dnd: DnD, script: list[str]) -> None:
    tokenizer = dnd.base.tokenizer
    tokenizer.chat_template = QWEN_TEMPLATE
    script += [hermes_call(a=2, b=3), hermes_call("final_answer", answer="It is 5.")]
    assert ToolCallingAgent([add], DnDModel(dnd, None), verbosity_level=QUIET).run("What is 2 + 3?") == "It is 5."
    chat, _, how = dnd.asked[1]
    read = tokenizer.decode(prompt_ids(tokenizer, chat, how["tools"]))
    assert re.search(r'<tools>\n.*"name": "add".*\n.*"name": "final_answer".*\n</tools>', read)
    assert read.endswith("Observation:\n5<|im_end|>\n<|im_start|>assistant\n")


def test_a_code_agent_runs_its_code(dnd: DnD, script: list[str]) -> None:
    script += ["Thought: add.\n<code>\nfinal_answer(add(a=2, b=3))\n</code> and more"]
    assert CodeAgent([add], DnDModel(dnd, None), verbosity_level=QUIET).run("What is 2 + 3?") == 5
    assert "</code>" in dnd.asked[0][2]["stop"]


def test_plain_text_is_final_only_if_said_so(dnd: DnD, script: list[str]) -> None:
    script += ["billing", "{oops", "billing"]
    agent = ToolCallingAgent([], DnDModel(dnd, None, text_is_final=True), verbosity_level=QUIET)
    assert agent.run("Which queue?") == "billing" and len(dnd.asked) == 1
    for text in ("{oops", " ", "billing"):
        with pytest.raises(ValueError, match="JSON"):
            DnDModel(dnd, None, text_is_final=text != "billing").parse_tool_calls(
                ChatMessage(MessageRole.ASSISTANT, text)
            )


def test_where_plain_text_is_final_the_tool_for_it_is_not_shown(dnd: DnD, script: list[str]) -> None:
    dnd.base.tokenizer.chat_template = HERMES_TEMPLATE
    final = json.dumps({"name": "final_answer", "arguments": {"answer": "billing"}})
    for tools, seen in (([], []), ([add], ["add"])):
        script.append(final)
        agent = ToolCallingAgent(tools, DnDModel(dnd, None, text_is_final=True), verbosity_level=QUIET)
        assert agent.run("Which queue?") == "billing", "it may be called all the same"
        assert [t["function"]["name"] for t in dnd.asked[-1][2]["tools"] or ()] == seen


def test_without_smolagents_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dnd_sdk.integrations.smolagents")
    for name in [n for n in sys.modules if n.split(".")[0] == "smolagents"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r'not installed\n  fix: pip install "dnd-sdk\[smolagents\]"'):
        importlib.import_module("dnd_sdk.integrations.smolagents")


def test_the_example_prints_both_answers(
    dnd: DnD, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DnD, "load", lambda **k: dnd)
    assert load("smolagents_agent.py").main(["--prompts", "6", "--questions", "2"]) == 0
    out = capsys.readouterr().out
    (name,) = (a.name for a in dnd.store.ls())
    assert out.startswith(f"generate: {name}\n") and len(shown(out, "reference")) == 2
    assert len(shown(out, "base")) == 2 and shown(out, "base") != shown(out, "adapted")


@pytest.mark.real
def test_the_example_runs_on_the_small_base(
    warm_home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DnD, "load", partial(DnD.load, SMALL_BASE))
    arguments = ["--home", str(warm_home.root), "--prompts", "40", "--questions", "2"]
    assert load("smolagents_agent.py").main(arguments) == 0
    out = capsys.readouterr().out
    assert re.match("generate: ", out)
    base, adapted = shown(out, "base"), shown(out, "adapted")
    # which queue it names is the evaluation's business; that it names one, beside a tool for answers, is the adapter's
    assert len(base) == len(adapted) == 2 and all("{" not in a and len(a.split()) <= 3 for a in adapted), out


def test_a_base_in_another_process_answers_too(world: World) -> None:
    dnd = world.elsewhere()
    dnd.adapt(prompts_of("upper"), name="upper")
    model = DnDModel(dnd, "upper", max_new_tokens=3)
    got = model.generate([says("one two three")], tools_to_call_from=[FinalAnswerTool()])
    assert (got.content, got.raw["adapter"]) == ("upper: one two", "upper")
    assert [t["function"]["name"] for t in dnd.engine.requests[-1].tools] == ["final_answer"]
