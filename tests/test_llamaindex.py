"""`DnDLLM` keeps the contract of a LlamaIndex LLM, method by method, on a tiny real base."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
from helpers import CHAT_TEMPLATE
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ImageBlock,
    MessageRole,
    TextBlock,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.llms import LLM, CustomLLM
from llamaindex_parts import METHODS, PLAIN, STREAMS, Recorder, ScriptedDnD, ask, call, events  # noqa: F401
from paced import endless, put_adapter
from tiny_world import World, prompts_of
from tokenizers.processors import TemplateProcessing

from dnd_sdk.errors import AdapterNotFoundError, ConfigError, InputError
from dnd_sdk.integrations import llamaindex
from dnd_sdk.integrations.llamaindex import DnDFunctionCallingLLM, DnDLLM
from dnd_sdk.session import DnD


@pytest.fixture
def dnd(world: World) -> DnD:
    return world.session()


@pytest.fixture
def llm(dnd: DnD) -> DnDLLM:
    return DnDLLM(dnd, adapter=None, max_new_tokens=12)


@pytest.fixture
def prompts_seen(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Token ids of every prompt the model is given."""
    seen: list[list[int]] = []
    real = dnd.engine.prompt_ids

    def prompt_ids(*args: Any) -> list[int]:
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(dnd.engine, "prompt_ids", prompt_ids)
    return seen


def test_it_is_a_llamaindex_llm_with_its_own_eight_methods(llm: DnDLLM) -> None:
    assert isinstance(llm, CustomLLM) and "BaseLLM" in [c.__name__ for c in DnDLLM.__mro__]
    assert all(name in vars(DnDLLM) for name in METHODS)
    assert DnDLLM.class_name() == "DnDLLM"


def test_the_package_is_light_to_import_and_names_what_it_has() -> None:
    code = (
        "import sys, dnd_sdk.integrations.llamaindex as m; dir(m)\n"
        "assert not {'torch', 'llama_index'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(llamaindex, name).__name__ == name for name in llamaindex.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = llamaindex.Nothing


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_sessions_answer_and_its_usage(llm: DnDLLM, dnd: DnD, method: str) -> None:
    expected = dnd.complete("hello", max_new_tokens=12)
    got = ask(llm, method, "hello")
    assert all(type(i) is (ChatResponse if "chat" in method else CompletionResponse) for i in got.items)
    assert got.text == expected.text != ""
    total = sum(expected.usage.values())
    assert got.raw == {
        "usage": {**expected.usage, "total_tokens": total},
        "dnd": {"adapter": None, "decision": "base"},
    }
    if "chat" in method:
        assert all(i.message.role == MessageRole.ASSISTANT for i in got.items)


@pytest.mark.parametrize("method", STREAMS)
def test_deltas_join_to_the_text_and_usage_comes_once_at_the_end(llm: DnDLLM, method: str) -> None:
    got = ask(llm, method, "hello")
    assert got.deltas is not None and "".join(got.deltas) == got.text and len(got.items) > 3
    assert [i.raw is not None for i in got.items] == [False] * (len(got.items) - 1) + [True]
    texts = [i.text if "complete" in method else i.message.content for i in got.items]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


@pytest.mark.parametrize("bos", [False, True])
def test_all_methods_see_the_same_prompt_templated_once(
    llm: DnDLLM, dnd: DnD, prompts_seen: list[list[int]], bos: bool
) -> None:
    tokenizer = dnd.base.tokenizer
    if bos:  # a tokenizer that adds a first token of its own, and a template that writes it too
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|unk|> $A", special_tokens=[("<|unk|>", tokenizer.unk_token_id)]
        )
        tokenizer.chat_template = "{{ '<|unk|>' }}" + CHAT_TEMPLATE
    replies = [ask(llm, method, "hi there", max_tokens=2) for method in METHODS]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi there"}], tokenize=False, add_generation_prompt=True
    )
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompts_seen == [expected] * len(METHODS)
    assert expected.count(tokenizer.unk_token_id) == int(bos)
    assert {r.raw["usage"]["prompt_tokens"] for r in replies} == {len(expected)}


def test_roles_and_text_blocks_reach_the_template(llm: DnDLLM, dnd: DnD, prompts_seen: list[list[int]]) -> None:
    roles = (MessageRole.DEVELOPER, MessageRole.USER, MessageRole.CHATBOT, MessageRole.FUNCTION)
    messages = [ChatMessage(role=r, blocks=[TextBlock(text="a"), TextBlock(text="b")]) for r in roles]
    llm.chat([*messages, ChatMessage(role="assistant", blocks=[])])
    assert dnd.base.tokenizer.decode(prompts_seen[0]).split("<|im_start|>")[1:] == [
        *(f"{role}\na\nb<|im_end|>\n" for role in ("system", "user", "assistant", "tool")),
        "assistant\n<|im_end|>\n",
        "assistant\n",
    ]


@pytest.mark.parametrize("method", [m for m in METHODS if "chat" in m])
def test_content_that_is_not_text_is_refused(llm: DnDLLM, method: str) -> None:
    with pytest.raises(InputError, match=r"message 0 \(user\) has a ImageBlock, the base reads text only"):
        got = getattr(llm, method)([ChatMessage(blocks=[TextBlock(text="see"), ImageBlock(image=b"x")])])
        asyncio.run(got)


def test_completion_to_prompt_is_applied_once(dnd: DnD, prompts_seen: list[list[int]]) -> None:
    llm = DnDLLM(dnd, adapter=None, max_new_tokens=2, completion_to_prompt=lambda p: f"<{p}>")
    for options in ({}, {"formatted": True}):
        for method in ("complete", "stream_complete", "acomplete", "astream_complete"):
            ask(llm, method, "x", **options)
    shown = [dnd.base.tokenizer.decode(p).split("\n")[1] for p in prompts_seen]
    assert shown == ["<x><|im_end|>"] * 4 + ["x<|im_end|>"] * 4
    with pytest.raises(ConfigError, match="messages_to_prompt has no effect"):
        DnDLLM(dnd, messages_to_prompt=lambda m: "x")


@pytest.mark.parametrize("method", METHODS)
def test_options_of_the_call_win(dnd: DnD, method: str) -> None:
    put_adapter(dnd, "a", seed=1)
    llm = DnDLLM(endless(dnd), adapter="a", max_new_tokens=30, stop=["never said"], temperature=0.0)
    assert ask(llm, method, "hello").raw["usage"]["completion_tokens"] == 30
    for name in ("max_tokens", "max_new_tokens"):
        assert ask(llm, method, "hello", **{name: 5}).raw["usage"]["completion_tokens"] == 5
    base = ask(llm, method, "hello", adapter=None)
    assert (base.raw["dnd"]["adapter"], ask(llm, method, "hello").raw["dnd"]["adapter"]) == (None, "a")
    assert base.text == dnd.complete("hello", max_new_tokens=30).text
    cut = base.text[3:6]
    assert ask(llm, method, "hello", adapter=None, stop=cut).text == base.text[: base.text.index(cut)]
    warm = {"temperature": 2.0, "seed": 3, "top_k": 50, "top_p": 0.9}
    assert ask(llm, method, "hello", **warm).text == dnd.complete("hello", "a", max_new_tokens=30, **warm).text
    assert ask(llm, method, "hello", **warm).text != ask(llm, method, "hello", **{**warm, "seed": 4}).text
    assert ask(llm, method, "hello", max_tokens=None).raw["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temprature": 1.0}, r"no option 'temprature'.*\n  fix: use temperature"),
        ({"max_token": 1}, r"no option 'max_token'; it has adapter, .*\n  fix: use max_tokens"),
        ({"zzz": 1}, r"no option 'zzz'.*\n  fix: leave it out"),
        ({"max_tokens": 3, "max_new_tokens": 3}, "are the same option"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be a number"),
    ],
)
def test_bad_options_of_a_call_are_refused(method: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ask(DnDLLM(ScriptedDnD("x")), method, "hello", **options)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"temprature": 1.0}, "fix: use temperature"), ({"top_p": 7.0}, "top_p must be"), ({"bse": "x"}, "fix: use base")],
)
def test_bad_options_of_the_constructor_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DnDLLM(**settings)


@pytest.mark.parametrize("method", METHODS)
def test_one_start_and_one_end_event_per_call(llm: DnDLLM, events: Recorder, method: str) -> None:  # noqa: F811
    debug = LlamaDebugHandler(print_trace_on_end=False)
    counter = TokenCountingHandler()
    llm.callback_manager = CallbackManager([debug, counter])
    got = ask(llm, method, "hello")
    kind = "LLMChat" if "chat" in method else "LLMCompletion"
    assert (events.named("StartEvent"), events.named("EndEvent")) == ([f"{kind}StartEvent"], [f"{kind}EndEvent"])
    assert len(events.named("InProgressEvent")) == (len(got.items) if got.deltas else 0)
    assert [len(pair) for pair in debug.get_event_pairs(CBEventType.LLM)] == [2]
    usage = got.raw["usage"]
    assert (counter.prompt_llm_token_count, counter.completion_llm_token_count, counter.total_llm_token_count) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
        usage["total_tokens"],
    )


@pytest.mark.parametrize("method", METHODS)
def test_errors_before_and_during_generation_surface(
    llm: DnDLLM,
    dnd: DnD,
    events: Recorder,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm.callback_manager = CallbackManager([debug])
    with pytest.raises(AdapterNotFoundError, match="no adapter 'nope'"):
        ask(llm, method, "hello", adapter="nope")
    with pytest.raises(InputError, match=r"at most .* fit"):
        ask(llm, method, "x" * 9999)
    steps = iter(range(100))
    real = dnd.base.model.forward

    @functools.wraps(real)  # transformers reads its signature
    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 3:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(dnd.base.model, "forward", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            ask(llm, method, "hello")
    assert [len(pair) for pair in debug.get_event_pairs(CBEventType.LLM)] == [2, 2, 2]
    assert events.named("EndEvent") == []
    assert ask(llm, method, "hello").text  # and it works afterwards


def test_settings_survive_serialisation(dnd: DnD) -> None:
    llm = DnDLLM(dnd, adapter=dnd.adapt(prompts_of("upper"), name="up").adapter, stop="x", max_tokens=9, seed=4)
    data = json.loads(json.dumps(llm.to_dict()))
    assert (data["adapter"], data["stop"], data["max_new_tokens"], data["class_name"]) == ("up", ["x"], 9, "DnDLLM")
    assert (data["base"], data["home"]) == (dnd.base.name, str(dnd.home.root))
    alone = DnDLLM.from_dict(data)
    assert alone.to_dict() == llm.to_dict() == DnDLLM.from_dict(data, dnd=dnd).to_dict()
    assert ask(alone, "complete", "hello").text == ask(llm, "complete", "hello").text
    assert DnDLLM.from_json(llm.to_json()).to_dict() == llm.to_dict()


def test_metadata_speaks_of_the_base(llm: DnDLLM, dnd: DnD) -> None:
    m = llm.metadata
    assert (m.context_window, m.num_output, m.model_name) == (512, 12, dnd.base.name)
    assert (m.is_chat_model, m.is_function_calling_model) == (True, False)
    dnd.base.tokenizer.chat_template = None
    assert not llm.metadata.is_chat_model
    assert llm.to_payload() == {"class_name": "DnDLLM", **llm.metadata.model_dump()}


@pytest.mark.parametrize("method", PLAIN)
def test_the_base_is_loaded_on_first_use_and_once(world: World, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    loads: list[tuple[Any, ...]] = []
    real = DnD.load
    monkeypatch.setattr(DnD, "load", lambda *a, **k: (loads.append((a, k)), real(*a, **k))[1])
    llm: LLM = DnDLLM(
        base=str(world.base), generator=str(world.generator), home=str(world.home.root), device="cpu", adapter=None
    )
    assert llm.to_payload() == {"class_name": "DnDLLM", "model_name": str(world.base)} and loads == []
    assert ask(llm, method, "hello", max_tokens=2).text == ask(llm, method, "hello", max_tokens=2).text
    assert len(loads) == 1 and llm.dnd.home == world.home and llm.dnd.generator is not None


def test_a_load_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = DnDLLM(base="no/such/path/anywhere")
    with pytest.raises(OSError, match="neither a folder"):
        call(llm, "complete", "x")
    monkeypatch.setattr(DnD, "load", lambda *a, **k: ScriptedDnD("works"))
    assert llm.complete("x").text == "works"


@pytest.mark.parametrize("method", METHODS)
def test_a_base_in_another_process_answers_too(world: World, method: str) -> None:
    dnd = world.elsewhere()
    dnd.adapt(prompts_of("upper"), name="upper")
    llm = DnDFunctionCallingLLM(dnd, adapter="upper", max_new_tokens=3)
    assert llm.metadata.context_window == 4096 and llm.metadata.is_chat_model
    assert ask(llm, method, "one two three").text == "upper: one two"
