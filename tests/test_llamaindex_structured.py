"""Structured answers through LlamaIndex: held to the class or schema, whichever way they are asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Literal

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.types import PydanticProgramMode
from llamaindex_parts import METHODS, ScriptedDnD, ask, roomy
from paced import put_adapter
from pydantic import BaseModel, Field
from tiny_world import World
from tool_parts import ADD, HERMES_TEMPLATE

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.integrations.llamaindex import DnDFunctionCallingLLM, DnDLLM
from dnd_sdk.models import SMALL_BASE
from dnd_sdk.session import DnD

ASK = PromptTemplate("A parcel like {what}.")
SIZE = {"type": "object", "properties": {"size": {"enum": [1, 22, 333]}}, "required": ["size"]}
SIZE["additionalProperties"] = False


class Place(BaseModel):
    """Where it is."""

    town: str = Field(max_length=5)
    floor: int = Field(ge=0, le=9)


class Parcel(BaseModel):
    """Bounded, so that a random base comes to an end."""

    state: Literal["lost", "found"]
    fragile: bool
    place: Place


@pytest.fixture
def dnd(world: World) -> DnD:
    session = roomy(world.session())
    put_adapter(session, "mine", seed=1)
    return session


@pytest.fixture
def llm(dnd: DnD) -> DnDLLM:
    return DnDLLM(dnd, adapter="mine", max_new_tokens=160)


async def alast(llm: DnDLLM, *args: Any, **kwargs: Any) -> Any:
    """The last object of the asynchronous stream."""
    return [o async for o in await llm.astream_structured_predict(*args, **kwargs)][-1]


async def alast_chat(llm: DnDLLM, said: str) -> Any:
    """The object of the asynchronous structured chat."""
    return [r async for r in await llm.as_structured_llm(Parcel).astream_chat([ChatMessage(content=said)])][-1].raw


PREDICT: dict[str, Callable[..., Any]] = {
    "plain": lambda llm, **how: llm.structured_predict(Parcel, ASK, what="THIS", **how),
    "async": lambda llm, **how: asyncio.run(llm.astructured_predict(Parcel, ASK, what="THIS", **how)),
    "stream": lambda llm, **how: list(llm.stream_structured_predict(Parcel, ASK, what="THIS", **how))[-1],
    "async stream": lambda llm, **how: asyncio.run(alast(llm, Parcel, ASK, what="THIS", **how)),
}


def test_every_way_of_predicting_gives_the_same_filled_class(llm: DnDLLM) -> None:
    got = [predict(llm) for predict in PREDICT.values()]
    assert all(isinstance(g, Parcel) for g in got) and got == [got[0]] * 4
    assert PREDICT["plain"](DnDLLM(llm.dnd, adapter=None, max_new_tokens=160)) != got[0]


def test_a_structured_llm_is_held_to_its_class(llm: DnDLLM) -> None:
    held, said = llm.as_structured_llm(Parcel), [ChatMessage(content="A parcel.")]
    whole = held.chat(said)
    assert isinstance(whole.raw, Parcel) and Parcel.model_validate_json(whole.message.content or "") == whole.raw
    assert held.complete("A parcel.").raw == asyncio.run(held.achat(said)).raw == whole.raw
    assert [*held.stream_chat(said)][-1].raw == asyncio.run(alast_chat(llm, "A parcel.")) == whole.raw


@pytest.mark.parametrize("method", METHODS)
def test_a_schema_is_an_option_of_every_call(llm: DnDLLM, method: str) -> None:
    for schema in (SIZE, json.dumps(SIZE)):
        got = ask(llm, method, "hello", schema=schema)
        assert json.loads(got.text)["size"] in (1, 22, 333) and got.raw["dnd"]["adapter"] == "mine"
    assert Parcel.model_validate_json(ask(llm, method, "hello", schema=Parcel).text)


def test_options_of_the_call_stay_and_no_schema_holds_to_nothing() -> None:
    said = '{"state": "lost", "fragile": true, "place": {"town": "x", "floor": 1}}'
    scripted = ScriptedDnD(said, said)
    for more in ({}, {"schema": None}):
        PREDICT["plain"](DnDLLM(scripted), llm_kwargs={"max_tokens": 7, "adapter": "mine", **more})
    assert [(adapter, how["max_new_tokens"]) for _, adapter, how in scripted.chats] == [("mine", 7)] * 2
    held, free = (how["schema"] for _, _, how in scripted.chats)
    assert json.loads(held)["properties"].keys() == Parcel.model_fields.keys() and free is None


@pytest.mark.parametrize("way", PREDICT)
def test_an_answer_that_is_cut_names_the_limit(llm: DnDLLM, way: str) -> None:
    with pytest.raises(InputError, match=r'max_new_tokens=12 cut the answer .*: \'\{"state(.|\n)*raise max_new_tokens'):
        PREDICT[way](llm, llm_kwargs={"max_new_tokens": 12})


@pytest.mark.parametrize("method", METHODS)
def test_a_call_with_a_schema_that_is_cut_names_the_limit(llm: DnDLLM, method: str) -> None:
    with pytest.raises(InputError, match="max_new_tokens=5 cut the answer"):
        ask(llm, method, "hello", schema=SIZE, max_tokens=5)
    assert ask(llm, method, "hello", max_tokens=5).raw["usage"]["completion_tokens"] == 5
    n = ask(llm, method, "hello", schema=SIZE).raw["usage"]["completion_tokens"]
    assert json.loads(ask(llm, method, "hello", schema=SIZE, max_tokens=n - 1).text)  # only the end token is missing


@pytest.mark.parametrize("way", PREDICT)
def test_a_class_that_cannot_be_enforced_is_refused(llm: DnDLLM, way: str) -> None:
    with pytest.raises(ConfigError, match="at /format: Unknown format"):
        PREDICT[way](llm, llm_kwargs={"schema": {"type": "string", "format": "weird"}})
    with pytest.raises(ConfigError, match="schema must be a JSON schema"):
        PREDICT[way](llm, llm_kwargs={"schema": 3})


def test_with_tools_to_call_structured_answers_are_held_as_well(dnd: DnD) -> None:
    dnd.base.tokenizer.chat_template = HERMES_TEMPLATE
    llm = DnDFunctionCallingLLM(dnd, adapter="mine", max_new_tokens=160)
    assert isinstance(PREDICT["plain"](llm), Parcel) and PREDICT["stream"](llm) == PREDICT["plain"](llm)
    for method in (m for m in METHODS if "chat" in m):
        assert json.loads(ask(llm, method, "hello", tools=[ADD], schema=SIZE).text)
        assert json.loads(ask(llm, method, "hello", tools=[], schema=SIZE).text)


def test_programs_of_other_modes_are_not_held() -> None:
    scripted = ScriptedDnD('{"state": "lost", "fragile": true, "place": {"town": "x", "floor": 1}}')
    llm = DnDLLM(scripted, pydantic_program_mode="default")
    assert llm.pydantic_program_mode is PydanticProgramMode.DEFAULT and isinstance(PREDICT["plain"](llm), Parcel)
    assert scripted.chats[0][2]["schema"] is None


class Ticket(BaseModel):
    """A request to a support desk."""

    queue: Literal["billing", "shipping", "login"]
    urgent: bool
    words: list[str] = Field(min_length=1, max_length=3)


@pytest.mark.real
def test_classes_come_back_filled_from_the_embedded_base(real_home: Home) -> None:
    llm = DnDLLM(base=SMALL_BASE, home=str(real_home.root), device="cpu", adapter=None, max_new_tokens=120)
    prompt = PromptTemplate("Read this request and fill in the fields.\n\n{text}")
    texts = ("My card was charged twice!", "Where is my parcel?", "I cannot sign in since the update.")
    got = [llm.structured_predict(Ticket, prompt, text=text) for text in texts]
    assert all(isinstance(g, Ticket) and 1 <= len(g.words) <= 3 for g in got)
    assert llm.as_structured_llm(Ticket).complete("My card was charged twice!").raw.queue
