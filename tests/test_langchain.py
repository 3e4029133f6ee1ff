"""`DnDChat` answers as the session does, whichever of its methods is called, and keeps the contract of a chat model."""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
from llamaindex_parts import roomy
from paced import Pace, endless, put_adapter
from tiny_world import World, prompts_of

from dnd_sdk.errors import ConfigError, InputError, MissingExtraError
from dnd_sdk.observing.prompt_stream import StreamSettings
from dnd_sdk.session import DnD

pytest.importorskip("langchain_core")

from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.load import dumpd, dumps, load
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField

from dnd_sdk.integrations.langchain import DnDChat
from dnd_sdk.integrations.langchain.messages import to_chat


@pytest.fixture
def dnd(world: World) -> DnD:
    return roomy(world.session())


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    first, *others = chunks
    return first + others if others else first  # type: ignore[return-value]


async def aread(chat: Any, asked: Any, **options: Any) -> AIMessageChunk:
    return joined([c async for c in chat.astream(asked, **options)])


WAYS: dict[str, Callable[..., AIMessage]] = {
    "invoke": lambda chat, asked, **o: chat.invoke(asked, **o),
    "ainvoke": lambda chat, asked, **o: asyncio.run(chat.ainvoke(asked, **o)),
    "stream": lambda chat, asked, **o: joined(list(chat.stream(asked, **o))),
    "astream": lambda chat, asked, **o: asyncio.run(aread(chat, asked, **o)),
    "batch": lambda chat, asked, **o: chat.batch([asked, asked], **o)[1],
    "abatch": lambda chat, asked, **o: asyncio.run(chat.abatch([asked, asked], **o))[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_the_sessions_with_its_usage(dnd: DnD, way: str) -> None:
    put_adapter(dnd, "mine", seed=1)
    expected = dnd.complete("hello", "mine", max_new_tokens=8)
    got = WAYS[way](DnDChat(dnd, adapter="mine", max_tokens=8), "hello")
    assert got.content == expected.text != dnd.complete("hello", max_new_tokens=8).text
    read, written = expected.usage["prompt_tokens"], expected.usage["completion_tokens"]
    assert got.usage_metadata == {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
    assert got.response_metadata == {
        "model_name": dnd.base.name,
        "model_provider": "dnd",
        "finish_reason": expected.finish_reason,
        "adapter": "mine",
        "decision": "reuse",
    }


@pytest.mark.parametrize("way", WAYS)
def test_options_of_a_call_win(dnd: DnD, way: str) -> None:
    put_adapter(dnd, "mine", seed=1)
    chat = DnDChat(endless(dnd), adapter=None, max_tokens=30, temperature=2.0, seed=3)
    options = {"adapter": "mine", "temperature": 1.5, "seed": 4, "top_k": 9}
    expected = dnd.complete("hello", max_new_tokens=12, **options)
    got = WAYS[way](chat, "hello", max_tokens=12, **options)
    assert (got.content, got.response_metadata["finish_reason"]) == (expected.text, "length")
    whole = WAYS[way](chat, "hello", temperature=0).text
    cut = whole[4:6]
    assert WAYS[way](chat, "hello", temperature=0, stop=[cut]).text == whole.split(cut)[0]
    assert WAYS[way](DnDChat(dnd, adapter=None, stop=cut, max_new_tokens=30), "hello").text == whole.split(cut)[0]


def test_logprobs_come_as_openai_tells_them(dnd: DnD) -> None:
    got = DnDChat(dnd, adapter=None, max_tokens=5).invoke("hello", logprobs=2)
    content = got.response_metadata["logprobs"]["content"]
    assert len(content) >= 4 and all(len(t["top_logprobs"]) == 2 and t["logprob"] <= 0 for t in content)
    assert "".join(t["token"] for t in content).startswith(got.text[:3])


def test_auto_is_routed_by_the_last_user_message(world: World) -> None:
    dnd = roomy(world.session(reuse=0.98))
    dnd.adapt(prompts_of("lower"), name="cats")
    chat = DnDChat(dnd, max_tokens=3)
    ours, other = "the cat 7 sat on it", "0123456789 ** 99 !!"
    said = [HumanMessage(other), AIMessage("x"), HumanMessage(ours)]
    assert [chat.invoke(m).response_metadata["adapter"] for m in (said, other, [("system", "x")], [("user", " ")])] == [
        "cats",
        None,
        None,
        None,
    ]
    assert chat.invoke(other, adapter=dnd.store.get("cats")).response_metadata["adapter"] == "cats"
    assert DnDChat(dnd, adapter=dnd.store.get("cats")).adapter == "cats"


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
def test_observed_requests_are_adapted_to_on_the_fly(world: World, way: str) -> None:
    dnd = roomy(world.session(stream=StreamSettings(min_prompts=4)))
    chat = DnDChat(dnd, observe=True, max_tokens=2)
    who = [WAYS[way](chat, p).response_metadata["adapter"] for p in prompts_of("upper", 6)]
    [adapter] = dnd.store.ls()
    assert who[:3] == [None] * 3 and who[3:] == [adapter.name] * 3


def test_messages_become_the_chat_a_base_knows() -> None:
    call = {"name": "add", "args": {"a": 2}, "id": "c1"}
    messages: list[BaseMessage] = [
        SystemMessage("Be brief."),
        ChatMessage("and polite", role="developer"),
        HumanMessage([{"type": "text", "text": "2"}, "+ 3?"]),
        AIMessage([{"type": "text", "text": "I add."}, {"type": "tool_use", "id": "c1"}], tool_calls=[call]),
        ToolMessage("5", tool_call_id="c1"),
        AIMessageChunk("It is 5."),
    ]
    function = {"name": "add", "arguments": {"a": 2}}
    assert to_chat(messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "and polite"},
        {"role": "user", "content": "2\n+ 3?"},
        {
            "role": "assistant",
            "content": "I add.",
            "tool_calls": [{"type": "function", "id": "c1", "function": function}],
        },
        {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "It is 5."},
    ]
    with pytest.raises(InputError, match=r"message 1 \(human\) has a part of type 'image_url', the base reads text"):
        to_chat([messages[0], HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temprature": 1}, r"no option 'temprature'.*\n  fix: use temperature"),
        ({"top_p": 7}, "top_p must"),
        ({"adapter": 3}, "adapter"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "are the same option"),
    ],
)
def test_bad_options_are_refused(dnd: DnD, options: dict[str, Any], match: str) -> None:
    with pytest.raises((ConfigError, InputError), match=match):
        DnDChat(dnd, **options)
    for way in WAYS:
        with pytest.raises((ConfigError, InputError), match=match):
            WAYS[way](DnDChat(dnd), "a", **options)


def test_what_remote_models_take_is_taken_and_not_used(dnd: DnD) -> None:
    chat = DnDChat(dnd, adapter=None, api_key="hidden", timeout=3, max_retries=2, max_tokens=None, temperature=None)
    assert (chat.max_tokens, chat.temperature) == (256, 0.0) and "hidden" not in dumps(chat)


class Counter(BaseCallbackHandler):
    """How often each is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.told.append("start")

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.told.append("token")

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.told.append("end")


@pytest.mark.parametrize("way", WAYS)
def test_callbacks_fire_once(dnd: DnD, way: str) -> None:
    counter, usage = Counter(), UsageMetadataCallbackHandler()
    chat = DnDChat(endless(dnd), adapter=None, max_tokens=6)
    pieces = len(list(dnd.stream("hello", max_new_tokens=6)))
    config = {"callbacks": [counter, usage]}
    got = WAYS[way](chat, "hello", config=config)
    n = 2 if "batch" in way else 1
    assert [counter.told.count(what) for what in ("start", "end")] == [n, n]
    assert counter.told.count("token") == (pieces + 1 if "stream" in way else 0), "and the last"
    assert usage.usage_metadata[dnd.base.name]["output_tokens"] == n * got.usage_metadata["output_tokens"] == n * 6


def test_streaming_says_whether_invoke_streams_and_stream_does(dnd: DnD) -> None:
    pieces, n = {}, len(list(endless(dnd).stream("hello", max_new_tokens=6))) + 1
    for streaming in (None, True, False):
        chat, counter = DnDChat(dnd, adapter=None, max_tokens=6, streaming=streaming), Counter()
        chat.invoke("hello", config={"callbacks": [counter]})
        pieces[streaming] = counter.told.count("token"), len(list(chat.stream("hello")))
    assert pieces == {None: (0, n), True: (n, n), False: (0, 1)}


def test_a_batch_is_answered_together(dnd: DnD) -> None:
    put_adapter(dnd, "mine", seed=1)
    chat = DnDChat(endless(dnd), adapter=None, max_tokens=20)
    prompts = [f"hello {i}" for i in range(12)]
    pace = Pace(dnd.base.model)
    pace.allow()
    got = chat.batch(prompts)
    assert pace.tokens < 2 * 20, "steps of the base: LangChain's own few threads would need two rounds"
    assert [m.text for m in got] == [dnd.complete(p, max_new_tokens=20).text for p in prompts]
    assert chat.batch([]) == [] and len(chat.batch(prompts[:3], {"max_concurrency": 1})) == 3
    errors = chat.batch(["a", [("user", [{"type": "image"}])]], return_exceptions=True)
    assert isinstance(errors[0], AIMessage) and isinstance(errors[1], InputError)


def test_in_a_chain_with_a_choice_of_adapter_at_run_time(dnd: DnD) -> None:
    put_adapter(dnd, "mine", seed=1)
    fields = {"adapter": ConfigurableField(id="who"), "max_tokens": ConfigurableField(id="n")}
    chain = ChatPromptTemplate.from_messages([("user", "{x}")]) | DnDChat(dnd, adapter=None).configurable_fields(
        **fields
    )
    got = chain.invoke({"x": "hello"}, {"configurable": {"who": "mine", "n": 5}})
    assert got.text == dnd.complete("hello", "mine", max_new_tokens=5).text
    streamed = joined(list(chain.stream({"x": "hello"}, {"configurable": {"who": "mine", "n": 5}})))
    assert streamed.text == got.text


def test_it_is_pickled_and_serialised_without_its_session(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = DnDChat(dnd, adapter=None, max_tokens=5, stop=["x"], seed=3)
    data = pickle.dumps(chat)
    assert len(data) < 5_000 and "Tensor" not in json.dumps(dumpd(chat))
    loaded: list[Any] = []
    monkeypatch.setattr(DnD, "load", lambda *a, **k: loaded.append((a, k)) or dnd)
    revived = pickle.loads(data), load(dumpd(chat), allowed_objects=[DnDChat], valid_namespaces=["dnd_sdk"])
    assert all(other.asdict() == chat.asdict() and not loaded for other in revived)
    assert [other.invoke("hello").text for other in revived] == [chat.invoke("hello").text] * 2
    [(args, options), _] = loaded
    assert args[0] == dnd.base.name and options["home"] == str(dnd.home.root)
    for other in (copy.copy(chat), copy.deepcopy(chat), chat.model_copy(update={"seed": 4})):
        assert other.dnd is dnd and len(loaded) == 2


def test_a_session_is_loaded_on_first_use_and_once(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(DnD, "load", lambda *a, **k: loaded.append(a) or dnd)
    chat = DnDChat(model="some base", adapter=None, max_tokens=2)
    chat.bind(seed=1).with_config(tags=["a"])
    assert not loaded and repr(chat) and chat._get_ls_params()["ls_model_name"] == "some base"
    for way in WAYS.values():
        way(chat, "hello")
    assert loaded == [("some base", None)] and chat.dnd is dnd


def test_tokens_are_counted_by_the_base(dnd: DnD, world: World) -> None:
    assert DnDChat(dnd).get_num_tokens("hello") == len("hello"), "this base reads bytes"
    assert DnDChat(dnd, custom_get_token_ids=lambda text: [1]).get_num_tokens("hello") == 1


def test_a_base_in_another_process_answers_too(world: World) -> None:
    dnd = world.elsewhere()
    dnd.adapt(prompts_of("upper"), name="upper")
    for way in WAYS.values():
        got = way(DnDChat(dnd, adapter="upper", max_tokens=3), "one two three")
        assert (got.text, got.response_metadata["adapter"]) == ("upper: one two", "upper")


def test_without_langchain_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dnd_sdk.integrations.langchain.chat")
    for name in [n for n in sys.modules if n.split(".")[0] == "langchain_core"]:
        monkeypatch.setitem(sys.modules, name, None)
    package = importlib.import_module("dnd_sdk.integrations.langchain")
    with pytest.raises(MissingExtraError, match=r'not installed\n  fix: pip install "dnd-sdk\[langchain\]"'):
        _ = package.DnDChat
