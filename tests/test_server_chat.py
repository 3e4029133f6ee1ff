"""`/v1/chat/completions` and `/v1/completions`: what comes over the wire is what the session says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from server_parts import CHAT, Served, chat_body, serving, streamed
from tiny_world import World, prompts_of

from dnd_sdk.chat import call_schema, checked_schema
from dnd_sdk.engine import FakeBackend
from dnd_sdk.session import DnD

OBJECT = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    for name in ("weather", "news")
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from tiny_world import make_world

    dnd = make_world(tmp_path_factory.mktemp("world")).session()
    dnd.adapt(prompts_of("upper"), name="upper")
    with serving(dnd, answer_tokens=20) as now:
        yield now


@pytest.mark.parametrize("model", ["base", "upper", "auto"])
def test_a_chat_is_answered_as_the_session_does(served: Served, model: str) -> None:
    prompt = prompts_of("upper")[3]
    wanted = served.dnd.complete(prompt, None if model == "base" else model, max_new_tokens=9)
    got = served.chat(prompt, model, max_tokens=9)
    assert got["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": wanted.text, "refusal": None},
            "logprobs": None,
            "finish_reason": wanted.finish_reason,
        }
    ]
    assert got["usage"] == {**wanted.usage, "total_tokens": sum(wanted.usage.values())}
    assert (got["object"], got["model"]) == ("chat.completion", f"dnd:{model}")
    ms = got["dnd"].pop("ms")
    assert isinstance(ms, int) and got["dnd"] == {
        "adapter": wanted.adapter,
        "decision": wanted.decision,
        "score": wanted.score,
    }


def test_who_answered_is_in_the_headers(served: Served) -> None:
    for model, adapter, decision in (("base", "", "base"), ("upper", "upper", "reuse")):
        headers = served.http.post(CHAT, json=chat_body("hi", model, max_tokens=1)).headers
        assert (headers["x-dnd-adapter"], headers["x-dnd-decision"]) == (adapter, decision)


def test_names_of_a_model(served: Served) -> None:
    names = [m["id"] for m in served.http.get("/v1/models").json()["data"]]
    assert names == ["base", "dnd:auto", "dnd:upper", "encoder"]  # of folders their last part
    for name in (*names, "upper", "dnd:base"):
        found = served.http.get(f"/v1/models/{name}").json()
        assert (found["id"], found["object"]) == (name, "model")
        assert found["parent"] == ("base" if "upper" in name or "auto" in name else None)
    for name in ("base", "upper"):
        assert served.post(CHAT, {**chat_body("hi", max_tokens=1), "model": name})["model"] == name


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("asks_usage", [False, True])
def test_a_stream_joined_is_the_whole_answer(served: Served, path: str, n: int, asks_usage: bool) -> None:
    body = {"model": "upper", "max_tokens": 8, "n": n, "temperature": 0.9, "seed": 4}
    body |= {"messages": [{"role": "user", "content": "hello"}]} if path == CHAT else {"prompt": "hello"}
    whole = served.post(path, body)
    chunks = streamed(served, path, {**body, **({"stream_options": {"include_usage": True}} if asks_usage else {})})
    assert chunks.pop() == "[DONE]"
    texts, reasons = [""] * n, [None] * n
    for chunk in chunks:
        assert chunk["id"] == chunks[0]["id"] and chunk["object"].endswith(("chunk", "text_completion"))
        for choice in chunk["choices"]:
            i = choice["index"]
            assert reasons[i] is None  # nothing follows the reason
            texts[i] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
            reasons[i] = choice["finish_reason"]
    wanted = [c["message"]["content"] if path == CHAT else c["text"] for c in whole["choices"]]
    assert texts == wanted and reasons == [c["finish_reason"] for c in whole["choices"]]
    assert len(set(texts)) == n  # each draws apart
    told = [chunk for chunk in chunks if "usage" in chunk]
    assert [c["usage"] for c in told] == [whole["usage"]] and told[0] is chunks[-1]
    assert (told[0]["choices"] == []) == asks_usage and told[0]["dnd"]["adapter"] == "upper"
    if path == CHAT:
        assert [c["choices"][0]["delta"] for c in chunks[:n]] == [{"role": "assistant", "content": ""}] * n


def test_seeds_repeat_and_choices_differ(served: Served) -> None:
    asked = {"n": 2, "temperature": 1.0, "seed": 7, "max_tokens": 12}
    first, second = (served.chat("hello", **asked)["choices"] for _ in range(2))
    assert first == second and first[0]["message"] != first[1]["message"]
    unasked = served.chat("hello", n=2, max_tokens=12)["choices"]
    assert unasked[0]["message"] != unasked[1]["message"]  # of the likeliest tokens both would be one


def test_stops_lengths_and_penalties_reach_the_engine(served: Served) -> None:
    text = served.chat("hello", max_tokens=12)["choices"][0]["message"]["content"]
    assert len(text) > 3
    cut = served.chat("hello", max_tokens=12, stop=text[2:4])["choices"][0]
    assert cut["message"]["content"] == text[: text.index(text[2:4])] and cut["finish_reason"] == "stop"
    assert served.chat("hello", max_completion_tokens=2)["usage"]["completion_tokens"] == 2
    assert served.chat("hello", max_tokens=None)["usage"]["completion_tokens"] <= 20  # the server's own bound
    other = served.chat("hello", max_tokens=12, repetition_penalty=9.0)["choices"][0]["message"]["content"]
    assert other == served.dnd.complete("hello", max_new_tokens=12, repetition_penalty=9.0).text != text
    # greedy in OpenAI's and in vLLM's words
    assert served.chat("hello", max_tokens=12, temperature=1, top_p=0)["choices"][0]["message"]["content"] == text
    assert served.chat("hello", max_tokens=12, top_k=-1)["choices"][0]["message"]["content"] == text


def test_a_request_can_switch_off_the_servers_own_sampling(world: World) -> None:
    dnd = world.session()
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 5.0, "seed": 3}
    with serving(dnd, sampling={"top_k": 1}) as served:
        kept, off, all_of_them = (
            served.chat("hello", **options, **more)["choices"][0]["message"]["content"]
            for more in ({}, {"top_k": 0}, {"top_k": -1})
        )
        assert kept == served.chat("hello", max_tokens=12, temperature=0)["choices"][0]["message"]["content"]
        assert off == all_of_them == dnd.complete("hello", max_new_tokens=12, temperature=5.0, seed=3).text != kept


def test_logprobs_are_the_engines(served: Served) -> None:
    wanted = served.dnd.complete("hello", max_new_tokens=4, logprobs=2).logprobs
    assert wanted
    got = served.chat("hello", max_tokens=4, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [(t["token"], t["logprob"]) for t in got] == [(t.text, t.logprob) for t in wanted]
    assert [[(o["token"], o["logprob"]) for o in t["top_logprobs"]] for t in got] == [list(t.likeliest) for t in wanted]
    assert [bytes(t["bytes"]).decode() for t in got] == [t.text for t in wanted]
    old = served.post("/v1/completions", {"model": "base", "prompt": "hello", "max_tokens": 4, "logprobs": 2})
    told = old["choices"][0]["logprobs"]
    assert told["tokens"] == [t.text for t in wanted] and told["top_logprobs"][1] == dict(wanted[1].likeliest)
    chunks = streamed(served, CHAT, chat_body("hello", max_tokens=4, logprobs=True, top_logprobs=2))
    assert [c["choices"][0]["logprobs"]["content"] for c in chunks[:-1] if c["choices"][0]["logprobs"]] == [got]


def test_an_answer_is_held_to_a_schema(served: Served) -> None:
    held = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": OBJECT}}
    assert json.loads(served.chat("a number", response_format=held)["choices"][0]["message"]["content"])["n"] in (1, 22)
    free = served.chat("anything", response_format={"type": "json_object"}, max_tokens=12)["choices"][0]
    assert free["message"]["content"].lstrip().startswith("{")
    status, error = served.problem(
        "POST", CHAT, json=chat_body("hi", response_format={"type": "json_schema", "json_schema": {"name": "n"}})
    )
    assert status == 400 and "json_schema.schema" in error["message"]


def test_several_texts_and_their_echo(served: Served) -> None:
    body = {"model": "base", "prompt": ["one", "two"], "max_tokens": 4, "echo": True}
    got = served.post("/v1/completions", body)
    alone = [served.dnd.complete(p, max_new_tokens=4) for p in ("one", "two")]
    assert [c["text"] for c in got["choices"]] == ["one" + alone[0].text, "two" + alone[1].text]
    assert got["usage"]["prompt_tokens"] == sum(a.usage["prompt_tokens"] for a in alone)
    chunks = streamed(served, "/v1/completions", body)
    texts = ["", ""]
    for choice in (choice for c in chunks[:-1] for choice in c["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == [c["text"] for c in got["choices"]]


def test_prompts_of_the_request_make_its_adapter(served: Served) -> None:
    own = {"prompts": prompts_of("digits"), "mode": "auto"}
    got = served.chat(prompts_of("digits")[0], dnd=own, max_tokens=2)
    assert got["dnd"]["decision"] == "generate" and got["dnd"]["adapter"]
    again = served.chat(prompts_of("digits")[1], dnd=own, max_tokens=2)
    assert again["dnd"] == {**got["dnd"], "decision": "reuse", "score": 1.0, "ms": again["dnd"]["ms"]}
    base = served.chat(prompts_of("digits")[1], "upper", dnd={"mode": "base"}, max_tokens=2)
    assert base["dnd"]["adapter"] is None
    served.dnd.store.rm(got["dnd"]["adapter"])


def test_parts_roles_and_unknown_fields_are_taken(served: Served) -> None:
    wanted = served.dnd.complete(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one\ntwo"}], max_new_tokens=6
    )
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "me"}]
    body = {"model": "base", "messages": messages, "max_tokens": 6, "user": "x", "enable_thinking": False, "foo": [1]}
    assert served.post(CHAT, body)["choices"][0]["message"]["content"] == wanted.text


@pytest.fixture
def calling(world: World) -> Iterator[Served]:
    """A server whose base answers a question with the question."""
    dnd = world.elsewhere()
    assert isinstance(dnd.engine, FakeBackend)
    dnd.engine._answer = lambda request: request.chat[-1]["content"]  # type: ignore[index,call-overload]
    with serving(dnd) as now:
        yield now


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_read(calling: Served, stream: bool) -> None:
    text = "Let me look. " + call("weather", city="Oslo") + call("news", city="Rome")
    for more, names in (({}, ["weather", "news"]), ({"parallel_tool_calls": False}, ["weather"])):
        body = chat_body(text, tools=TOOLS, **more)
        if stream:
            chunks = streamed(calling, CHAT, body)[:-1]
            choices = [c["choices"][0] for c in chunks]
            said = "".join(c["delta"].get("content") or "" for c in choices)
            calls = [t for c in choices for t in c["delta"].get("tool_calls", [])]
            assert [t.pop("index") for t in calls] == list(range(len(names)))
            reason = choices[-1]["finish_reason"]
        else:
            choice = calling.post(CHAT, body)["choices"][0]
            said, calls, reason = choice["message"]["content"], choice["message"]["tool_calls"], choice["finish_reason"]
        assert (said, reason) == ("Let me look.", "tool_calls")
        assert [t["function"]["name"] for t in calls] == names
        assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Oslo"}
        assert all(t["type"] == "function" and t["id"] for t in calls) and len({t["id"] for t in calls}) == len(names)


def test_which_tools_are_on_offer(calling: Served) -> None:
    def offered(**fields: Any) -> Any:
        calling.post(CHAT, chat_body("hi", **fields))
        tools = calling.dnd.engine.requests[-1].tools  # type: ignore[attr-defined]
        return tools and [t["function"]["name"] for t in tools]

    assert offered() is None and offered(tools=TOOLS, tool_choice="none") is None
    assert offered(tools=TOOLS) == offered(tools=TOOLS, tool_choice="required") == ["weather", "news"]
    assert calling.dnd.engine.requests[-1].options.schema == checked_schema(call_schema(TOOLS))  # type: ignore[attr-defined]
    named = {"type": "function", "function": {"name": "news"}}
    assert offered(tools=TOOLS, tool_choice=named) == ["news"]
    assert calling.dnd.engine.requests[-1].options.schema == checked_schema(call_schema(TOOLS[1:]))  # type: ignore[attr-defined]
    assert offered(tools=TOOLS, tool_choice={"name": "news"}) == ["news"]  # as some write it
    named["function"]["name"] = "nothing"  # type: ignore[index]
    status, error = calling.problem("POST", CHAT, json=chat_body("hi", tools=TOOLS, tool_choice=named))
    assert (status, error["param"]) == (400, "tool_choice")


def test_results_of_tools_go_back_under_their_names(calling: Served) -> None:
    made = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "how is it?"},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
    ]
    calling.post(CHAT, {"model": "dnd:base", "messages": messages, "tools": TOOLS})
    chat: Any = calling.dnd.engine.requests[-1].chat  # type: ignore[attr-defined]
    assert chat[2] == {"role": "tool", "content": "cold", "tool_call_id": "call_1", "name": "weather"}
    assert chat[1]["tool_calls"][0]["function"]["name"] == "weather"


def test_words_that_only_begin_like_a_call_are_sent(calling: Served) -> None:
    text = "a <tool_ box and {no call}"
    chunks = streamed(calling, CHAT, chat_body(text, tools=TOOLS))[:-1]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == text
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_session_of_its_own_is_closed_with_the_server(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd, closed = world.session(), list[DnD]()
    monkeypatch.setattr(DnD, "close", lambda self: closed.append(self))
    with serving(dnd) as now:
        now.chat("hi", max_tokens=1)
        assert not closed
    assert closed == [dnd]
