"""Whatever a caller passes to a public call: a result of the right kind, or a `DndError` of a readable length."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_tokenizer
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from llama_index.core.base.llms.types import ChatMessage as LlamaMessage
from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from smolagents.models import ChatMessage
from tiny_world import World, prompts_of
from tool_parts import ADD, HERMES_TEMPLATE, LLAMA_TEMPLATE, QWEN_TEMPLATE

from dnd_sdk.adaptation import AdaptResult
from dnd_sdk.adapters import Adapter
from dnd_sdk.chat import prompt_ids
from dnd_sdk.config import SAMPLING, Home
from dnd_sdk.errors import DndError
from dnd_sdk.integrations.llamaindex import DnDLLM
from dnd_sdk.integrations.smolagents import DnDModel
from dnd_sdk.observing import ObserveResult
from dnd_sdk.routing import RouteDecision
from dnd_sdk.session import Completion, DnD

HALF = "half \ud83e of a pair"
WORDS = st.sampled_from([HALF, "", " ", "\0", "x" * 5_000, "auto", "a", "~nobody/x", "../a", "system", "user", "tool"])
TEXT = st.one_of(st.text(st.characters(), max_size=12), WORDS)
NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), st.sampled_from([10**400, -(10**5_000), 5e-324, 1e-40]))
ODD = st.builds(object) | st.sampled_from([int, len, np.float32("nan"), np.array([1, 2]), np.array("x"), 1j, range(3)])
LEAF = st.one_of(st.none(), NUMBERS, TEXT, st.binary(max_size=4), ODD)
KEYS = st.sampled_from(["role", "content", "tool_calls", "name", "function", "type", "text"])
MESSAGE = st.dictionaries(KEYS, LEAF | st.lists(st.dictionaries(KEYS, LEAF, max_size=3), max_size=2), max_size=4)
SAID = st.builds(lambda role, more: {"role": role, "content": "hi"} | more, WORDS, MESSAGE)
CHAT = st.lists(MESSAGE | SAID, max_size=3)
ANYTHING = st.one_of(
    LEAF,
    CHAT,
    st.lists(LEAF, max_size=3),
    st.lists(TEXT, max_size=3).map(tuple),
    st.dictionaries(TEXT, LEAF, max_size=2),
    st.sets(st.integers(), max_size=2),
    st.lists(LEAF, max_size=3).map(iter),
    st.lists(st.lists(LEAF, max_size=2), max_size=2),
)

Calls = dict[str, tuple[Callable[..., Any], dict[str, Any], type]]
SAY_HI = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
LIMIT = 2_000
"""Characters of a message."""


@pytest.fixture(scope="module")
def dnd(tiny_folders: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DnD]:
    session = tiny_folders._replace(home=Home(tmp_path_factory.mktemp("options"))).session()
    session.adapt(prompts_of("lower"), name="a")
    session.store.export("a", tmp_path_factory.mktemp("out") / "a")
    yield session
    session.close()


def answered(dnd: DnD, **how: Any) -> Completion:
    with dnd.stream(**how) as stream:
        return stream.result


ASKED = {"prompt": "hi", "adapter": None, "role": None, "tools": None, **dict.fromkeys(SAMPLING)} | {
    "max_new_tokens": 2,
    "temperature": 1.0,
    "top_p": 0.9,
    "top_k": 3,
    "stop": (),
}
BATCH = {"prompts": ["hi", "there"], "adapters": None, "role": None, "tools": None, "max_new_tokens": 1}
ADAPT = {"prompts": ["hi"], "mode": "reuse", "name": None, "role": None, "top_k": 3, "calibrate": None}
CALLS: Calls = {
    "complete": (DnD.complete, ASKED, Completion),
    "stream": (answered, ASKED | {"cancel": None}, Completion),
    "routed": (DnD.complete, {"prompt": "hi", "adapter": "auto", "role": None, "max_new_tokens": 1}, Completion),
    "in role": (DnD.complete, {"prompt": "hi", "role": "# Role: X", "tools": None, "max_new_tokens": 1}, Completion),
    "batch": (DnD.complete_batch, BATCH, list),
    "adapt": (DnD.adapt, ADAPT, AdaptResult),
    "route": (DnD.route, {"prompts": ["hi"], "role": None}, RouteDecision),
    "observe": (DnD.observe, {"prompt": "hi"}, ObserveResult),
    "import": (DnD.import_adapter, {"folder": "nowhere", "name": None, "prompts": None, "note": None}, Adapter),
    "get": (lambda dnd, **how: dnd.store.get(**how), {"name_or_id": "a"}, Adapter),
    "verify": (lambda dnd, **how: dnd.store.verify(**how), {"name": "a"}, list),
    "export": (lambda dnd, **how: dnd.store.export(**how), {"name": "nothing", "out_dir": "nowhere"}, Path),
}
ARGUMENTS = [(call, name) for call, (_, how, _) in CALLS.items() for name in how]
MANY = settings(
    max_examples=40,
    deadline=20_000,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def right_or_refused(call: Callable[..., Any], how: dict[str, Any], kind: type) -> None:
    try:
        assert isinstance(call(**how), kind)
    except DndError as e:
        assert len(str(e)) < LIMIT and str(e).encode()


@pytest.mark.parametrize(("call", "argument"), ARGUMENTS, ids=lambda p: p)
@MANY
@given(value=ANYTHING)
@example(value=5)
@example(value=HALF)
@example(value=[HALF])
@example(value="x" * 100_000)
@example(value=["x" * 100_000])
@example(value=[{"role": "user", "content": HALF}])
@example(value=10**400)
def test_any_argument_gives_a_right_result_or_an_error_of_ours(
    dnd: DnD, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str, argument: str, value: object
) -> None:
    monkeypatch.chdir(tmp_path)
    made, how, kind = CALLS[call]
    right_or_refused(lambda **given: made(dnd, **given), how | {argument: value}, kind)


LOAD = {"n_slots": 2, "generator": None, "encoder": None, "device": "cpu", "dtype": "auto", "progress": None}
WRONG = [5, 2.5, True, None, b"x", [], ["cpu"], {}, object(), "", "\0", HALF, "x" * 5_000, 0, -1, 10**400]


@pytest.mark.parametrize("argument", [*LOAD, "base", "home", "calibrate"])
def test_any_argument_of_load(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argument: str) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {"base": str(world.base), "encoder": str(world.encoder), "generator": world.generator}
    how = LOAD | folders | {"home": world.home}
    for value in WRONG:
        right_or_refused(DnD.load, how | {argument: value}, DnD)


CALL = st.builds(lambda call, more: {"type": "function", "function": {"name": "f"} | more} | call, MESSAGE, MESSAGE)
ARGUED = st.builds(lambda v: {"type": "function", "function": {"name": "f", "arguments": v, "parameters": v}}, ANYTHING)


@pytest.mark.parametrize("template", [HERMES_TEMPLATE, LLAMA_TEMPLATE, QWEN_TEMPLATE], ids=["hermes", "llama", "qwen"])
@MANY
@given(tools=st.lists(CALL | ARGUED, max_size=2), calls=st.lists(CALL | ARGUED, max_size=2))
@example(tools=[ADD], calls=[{"function": {"name": "f", "arguments": "[" * 100_000}}])
def test_any_tool_and_any_call_of_a_base_that_renders_them(template: str, tools: list[Any], calls: list[Any]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    right_or_refused(lambda: prompt_ids(tokenizer, chat, tools), {}, list)


@pytest.mark.parametrize("name", [*SAMPLING, "adapter"])
@MANY
@given(value=ANYTHING)
@example(value="x" * 100_000)
@example(value=True)
@example(value="5")
def test_integrations_refuse_as_the_library_does(dnd: DnD, name: str, value: object) -> None:
    short = {"adapter": None, "max_new_tokens": 1}
    right_or_refused(lambda: DnDLLM(dnd, **{"adapter": None, name: value}), {}, DnDLLM)
    right_or_refused(lambda: DnDModel(dnd, **{"adapter": None, name: value}), {}, DnDModel)
    llm, model = DnDLLM(dnd, **short), DnDModel(dnd, None)
    right_or_refused(lambda: llm.complete("hi", **{name: value}), {}, CompletionResponse)
    right_or_refused(lambda: model.generate(SAY_HI, **({"max_new_tokens": 1} | {name: value})), {}, ChatMessage)


@pytest.mark.parametrize("name", ["messages", "stop_sequences", "tools_to_call_from", "response_format"])
@MANY
@given(value=ANYTHING)
def test_any_argument_of_a_smolagents_model(dnd: DnD, name: str, value: object) -> None:
    model = DnDModel(dnd, None, max_new_tokens=1)
    right_or_refused(model.generate, {"messages": SAY_HI, name: value}, ChatMessage)


@MANY
@given(prompt=TEXT)  # what is no text LlamaIndex itself refuses, before it calls us
def test_any_prompt_of_a_llamaindex_llm(dnd: DnD, prompt: str) -> None:
    llm = DnDLLM(dnd, adapter=None, max_new_tokens=1)
    right_or_refused(lambda: llm.complete(prompt), {}, CompletionResponse)
    right_or_refused(lambda: llm.chat([LlamaMessage(role="user", content=prompt)]), {}, ChatResponse)


def test_integrations_refuse_half_a_surrogate_pair(dnd: DnD) -> None:
    llm = DnDLLM(dnd, adapter=None, max_new_tokens=1)
    for ask in (llm.complete, lambda p: list(llm.stream_complete(p)), lambda p: dnd.complete(p, adapter="auto")):
        with pytest.raises(DndError, match="surrogate"):
            ask(HALF)


@pytest.mark.parametrize("name", ["END", ("END",), ["END"]])
def test_one_stop_string_is_one_stop_string(dnd: DnD, name: Any) -> None:
    free = dnd.complete("hi", max_new_tokens=20)
    assert dnd.complete("hi", max_new_tokens=20, stop=name).text == free.text.partition("END")[0]


def test_a_cancel_is_an_event(dnd: DnD) -> None:
    with pytest.raises(DndError, match="cancel must be a"):
        dnd.stream("hi", cancel=5)
    done = threading.Event()
    done.set()
    assert dnd.stream("hi", cancel=done, max_new_tokens=400).result.finish_reason == "cancelled"
