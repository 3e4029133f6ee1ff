"""Requests in OpenAI's shapes as what a session is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from dnd_sdk.chat import ToolOffer, call_schema, choose_tools
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.server.problems import invalid
from dnd_sdk.server.settings import ServerSettings
from dnd_sdk.server.wire import Adapting, ChatRequest, CompletionRequest, Message, Part, Sampled

_ROLES = {"developer": "system", "function": "tool"}
_ANY_OBJECT = json.dumps({"type": "object"})


@dataclass(frozen=True)
class Asked:
    """One HTTP request for text."""

    model: str
    prompts: Sequence[Any]
    """What a session takes as a prompt, each to be answered `n` times."""
    sampling: dict[str, Any]
    n: int
    tools: list[dict[str, Any]]
    """That the model may call; empty: none."""
    one_call: bool = False
    """Whether an answer may hold one call of a tool at most."""
    may_clip: bool = False
    """Whether an answer ends where the context does, since its request names no length."""
    stream: bool = False
    include_usage: bool = False
    adapting: Adapting | None = None
    echo: Sequence[str] = field(default_factory=tuple)
    """What each prompt's answers begin with."""

    @property
    def n_choices(self) -> int:
        """Answers in all."""
        return self.n * len(self.prompts)


def read_chat(request: ChatRequest, settings: ServerSettings) -> Asked:
    """A chat; raises our errors or `RequestError` for what cannot be answered."""
    limit = request.max_completion_tokens or request.max_tokens
    offer = _offer(request)
    held = _schema(request)
    more: dict[str, Any] = {"schema": call_schema(offer.tools) if offer.must_call and held is None else held}
    if request.logprobs:
        more["logprobs"] = request.top_logprobs or 0
    elif request.top_logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    one_call = request.parallel_tool_calls is False
    return _asked(request, [_chat(request.messages)], limit, settings, more, tools=offer.tools, one_call=one_call)


def read_completion(request: CompletionRequest, settings: ServerSettings) -> Asked:
    """One or several texts, each read as a user's message; raises like `read_chat`."""
    prompts = texts_of(request.prompt, "prompt")
    more = {"logprobs": request.logprobs}
    return _asked(request, prompts, request.max_tokens, settings, more, echo=prompts if request.echo else ())


def texts_of(value: str | Sequence[Any], param: str) -> list[str]:
    """One text or several as a list; raises `RequestError` for tokens."""
    texts = [value] if isinstance(value, str) else list(value)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise invalid(f"{param} must be text or a list of texts: token ids of another model mean nothing here", param)
    return texts


def _asked(
    request: Sampled,
    prompts: Sequence[Any],
    limit: int | None,
    settings: ServerSettings,
    more: dict[str, Any],
    *,
    tools: Sequence[dict[str, Any]] = (),
    one_call: bool = False,
    echo: Sequence[str] = (),
) -> Asked:
    given = {
        # several answers of the likeliest tokens would be the same one
        "temperature": 1.0 if request.temperature is None and (request.n or 1) > 1 else request.temperature,
        "top_p": request.top_p or None,  # 0 leaves the likeliest alone, as greedy decoding does
        "top_k": None if request.top_k is None else max(0, request.top_k),  # -1 is vLLM's word for all
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "seed": request.seed,
        "stop": [request.stop] if isinstance(request.stop, str) else request.stop,
        **more,
    }
    if request.top_p == 0:
        given["temperature"] = 0.0
    sampling = {name: value for name, value in given.items() if value is not None}
    usage = request.stream_options is not None and bool(request.stream_options.include_usage)
    return Asked(
        model=request.model,
        prompts=prompts,
        sampling={**settings.sampling, **sampling, "max_new_tokens": limit or settings.answer_tokens},
        n=request.n or 1,
        tools=list(tools),
        one_call=one_call,
        may_clip=limit is None,
        stream=bool(request.stream),
        include_usage=usage,
        adapting=request.dnd,
        echo=echo,
    )


def _chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as chat templates know them: results of tools get their tool's name."""
    chat: list[dict[str, Any]] = []
    names: dict[str | None, str] = {}
    for row, message in enumerate(messages):
        role = _ROLES.get(message.role, message.role)
        plain: dict[str, Any] = {"role": role, "content": _text(message.content, row)}
        if message.tool_calls:
            calls = [call.model_dump(exclude_none=True) for call in message.tool_calls]
            names |= {call.id: call.function.name for call in message.tool_calls}
            plain["tool_calls"] = calls
        elif message.content is None:
            raise InputError(f"message {row} ({message.role}) has no content", fix="give it some text")
        if role == "tool":
            plain |= {"tool_call_id": message.tool_call_id, "name": message.name or names.get(message.tool_call_id)}
        chat.append(plain)
    return chat


def _text(content: str | Sequence[Part] | None, row: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    other = next((part.type for part in content if part.text is None), None)
    if other is not None:
        raise InputError(f"message {row} has a part {other[:80]!r}, the base reads text only", fix="leave it out")
    return "\n".join(part.text or "" for part in content)


def _offer(request: ChatRequest) -> ToolOffer:
    """The tools that the model is shown, and whether it must call one."""
    choice = request.tool_choice
    wrapped = choice.model_dump() if isinstance(choice, BaseModel) else choice
    try:
        return choose_tools([tool.model_dump(exclude_none=True) for tool in request.tools or ()], wrapped)
    except ConfigError as e:
        raise invalid(e.message, "tool_choice") from e


def _schema(request: ChatRequest) -> Any:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return _ANY_OBJECT
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ConfigError("response_format of type json_schema has no json_schema.schema", fix="give the schema")
    return wanted.json_schema.schema_
