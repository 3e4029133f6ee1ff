"""A plugin of the `llm` tool: `llm -m dnd ...` answers with the resident base and its adapters.

`llm` finds it by this package's entry point and is the only one to import it; nothing is loaded until a prompt is run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import click
import llm
from llm.parts import Message, TextPart, ToolCallPart, ToolResultPart
from pydantic import Field

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.chat import closed_schema, new_call_id
from dnd_sdk.config import Home
from dnd_sdk.errors import DndError, InputError
from dnd_sdk.settings import load_settings

if TYPE_CHECKING:  # loads torch
    from dnd_sdk.session import Call, CompletionStream, DnD, Part

AUTO_ID, BASE_ID = "dnd", "dnd/base"
"""What is routed by the prompt, and the base alone; an adapter is `dnd/NAME`."""

_loading = threading.Lock()


def resident() -> DnD:
    """The session of all models, with the settings of `dnd`: its files, its variables; loaded once."""
    with _loading:
        return _loaded()


@cache
def _loaded() -> DnD:
    from dnd_sdk.session import DnD

    return DnD.load(**load_settings().load_arguments(), progress=lambda note: click.echo(note, err=True))


@llm.hookimpl
def register_models(register: Any) -> None:
    """The routed one, the base, and each stored adapter of the base that is set."""
    register(DnDModel(AUTO_ID, "auto"), DnDAsyncModel(AUTO_ID, "auto"), aliases=("dnd/auto",))
    register(DnDModel(BASE_ID, None), DnDAsyncModel(BASE_ID, None))
    for name in _adapter_names():
        register(DnDModel(f"dnd/{name}", name), DnDAsyncModel(f"dnd/{name}", name))


def _adapter_names() -> list[str]:
    """Never fails: other plugins' models are to be listed all the same."""
    from dnd_sdk.adaptation import of_base

    try:
        settings = load_settings()
        stored = of_base(AdapterStore(Home.find(settings.home)).ls(), settings.base)
    except DndError:
        return []
    return [a.name for a in stored if f"dnd/{a.name}" not in (BASE_ID, "dnd/auto")]


class _Shared:
    """What both kinds of model have."""

    can_stream = True
    supports_schema = True
    supports_tools = True

    class Options(llm.Model.Options):
        """How the text is completed; what is not given is as `dnd run` has it."""

        temperature: float | None = Field(None, description="0 is greedy")
        max_tokens: int | None = Field(None, description="Upper bound on an answer's tokens")
        seed: int | None = Field(None, description="Makes sampling repeatable")
        top_p: float | None = Field(None, description="Nucleus mass, used when temperature > 0")
        top_k: int | None = Field(None, description="Most likely tokens to choose from; 0 keeps every one")
        min_p: float | None = Field(None, description="Least share of the likeliest token's probability")
        repetition_penalty: float | None = Field(None, description="Above 1, tokens already there become less likely")
        stop: str | None = Field(None, description="The answer is cut before it")

    def __init__(self, model_id: str, adapter: str | None) -> None:
        """`adapter`: a stored one's name, `"auto"`, or None for the base."""
        self.model_id, self._adapter = model_id, adapter

    def _call(self, prompt: llm.Prompt) -> Call:
        from dnd_sdk.session import Call, call_options, who_answers

        options = prompt.options.model_dump(exclude_none=True)
        if isinstance(prompt.schema, dict):  # a class's schema comes as one, too, and names all there is to say
            options["schema"] = closed_schema(prompt.schema)
        adapter, sampling = call_options(
            {**load_settings().sampling(), "adapter": self._adapter}, options, self.model_id
        )
        chat = to_chat(prompt.messages)
        tools = [_described(tool) for tool in prompt.tools if isinstance(tool, llm.Tool)]

        def start(end: threading.Event) -> CompletionStream:
            dnd = resident()
            who = who_answers(dnd, chat, adapter, tools, observe=False)
            return dnd.stream(chat, who, tools=tools or None, cancel=end, **sampling)

        return Call(start, tools=tools, held="schema" in options)


class DnDModel(_Shared, llm.Model):
    """The model of `llm prompt`, `llm chat` and `llm.get_model`."""

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str]:
        """Answer a prompt, piece by piece if `stream`; one that is not read to its end stops within a token."""
        call = self._call(prompt)
        for part in call.parts() if stream else _at_once(call.answer()):
            if part.delta:
                yield part.delta
            _tell(part, response)


class DnDAsyncModel(_Shared, llm.AsyncModel):
    """The model of `llm.get_async_model`; it never blocks the event loop."""

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.AsyncResponse, conversation: llm.AsyncConversation | None
    ) -> AsyncGenerator[str, None]:
        """`DnDModel.execute` in another thread."""
        async for part in self._call(prompt).aparts():
            if part.delta:
                yield part.delta
            _tell(part, response)


def to_chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages of `llm` as a session takes them. Raises `InputError` for what is not text."""
    return [said for message in messages for said in _said(message)]


def _said(message: Message) -> Iterator[dict[str, Any]]:
    """What one message comes to: results are a message each."""
    texts, calls = [], []
    for part in message.parts:
        if isinstance(part, ToolResultPart):
            yield {"role": "tool", "content": part.output, "tool_call_id": part.tool_call_id, "name": part.name}
        elif isinstance(part, ToolCallPart):
            function = {"name": part.name, "arguments": part.arguments}
            calls.append({"type": "function", "id": part.tool_call_id, "function": function})
        elif isinstance(part, TextPart):
            texts.append(part.text)
        else:
            raise InputError(f"a {message.role} message has a {type(part).__name__}, the base reads text only")
    if texts or calls:
        yield {"role": message.role, "content": "\n".join(texts)} | ({"tool_calls": calls} if calls else {})


def _described(tool: llm.Tool) -> dict[str, Any]:
    parameters = json.loads(json.dumps(tool.input_schema)) or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
    return {"type": "function", "function": function}


def _at_once(whole: Part) -> Iterator[Part]:
    yield whole._replace(delta=whole.text)


def _tell(part: Part, response: llm.Response | llm.AsyncResponse) -> None:
    """Who answered, its usage and its calls; nothing before the end."""
    done = part.completion
    if done is None:
        return
    response.set_usage(input=done.usage["prompt_tokens"], output=done.usage["completion_tokens"])
    response.set_resolved_model(BASE_ID if done.adapter is None else f"dnd/{done.adapter}")
    response.response_json = {"adapter": done.adapter, "decision": done.decision, "finish_reason": done.finish_reason}
    for call in part.calls:
        response.add_tool_call(llm.ToolCall(name=call.name, arguments=call.arguments, tool_call_id=new_call_id()))
