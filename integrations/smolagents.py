"""`DnDModel`: a smolagents model whose answers come from a resident `DnD` and its adapters.

Importing this module needs the extra `smolagents`; nothing else in the SDK imports it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Generator, Sequence
from dataclasses import asdict, replace
from itertools import count
from typing import Any

from dnd_sdk.chat import ToolCall, read_answer
from dnd_sdk.config import SamplingOptions
from dnd_sdk.errors import ConfigError, InputError, MissingExtraError, shown
from dnd_sdk.session import AUTO, AdapterChoice, DnD, call_options

try:
    from smolagents.models import (
        ChatMessage,
        ChatMessageStreamDelta,
        ChatMessageToolCall,
        ChatMessageToolCallFunction,
        ChatMessageToolCallStreamDelta,
        MessageRole,
        Model,
    )
    from smolagents.monitoring import TokenUsage
    from smolagents.tools import Tool
except ImportError as e:
    raise MissingExtraError("smolagents is not installed", fix='pip install "dnd-sdk[smolagents]"') from e

MAX_NEW_TOKENS = 1024
"""Unless the constructor or the call says otherwise; what smolagents' own local models take."""
FINAL_ANSWER = "final_answer"
"""The tool that every `ToolCallingAgent` has."""


class DnDModel(Model):  # type: ignore[misc]  # smolagents ships no types, so its `Model` is Any
    """A resident `DnD` for `CodeAgent` and `ToolCallingAgent`; safe to share between agents and threads.

    Options of the constructor win over those of a call, as in every smolagents model. Tools go through the base's chat
    template if it renders them; if not, they are what the agent's own system prompt says of them. `raw` holds which
    adapter answered and why.
    """

    def __init__(
        self, dnd: DnD, adapter: AdapterChoice = AUTO, *, text_is_final: bool = False, **sampling: Any
    ) -> None:
        """Answer with an adapter, its name, `"auto"` (routed by the agent's task; the base where the
        template shows it tools) or None (the base).

        `text_is_final`: an answer of `ToolCallingAgent` without any JSON in it is its final answer, and the base is not
        shown the tool for final answers: an adapter whose job is a word or two says it in JSON when it sees a tool.
        `sampling`: fields of `SamplingOptions`. Raises `ConfigError` for options that are unknown or out of range.
        """
        super().__init__(model_id=dnd.base.name, **sampling)
        self.dnd, self.adapter, self.text_is_final = dnd, adapter, text_is_final
        self._options(sampling)

    @property
    def supports_stop_parameter(self) -> bool:
        """Always, whatever the base is called."""
        return True

    def generate(
        self,
        messages: list[ChatMessage | dict[str, Any]],
        stop_sequences: list[str] | None = None,
        response_format: dict[str, str] | None = None,
        tools_to_call_from: list[Tool] | None = None,
        **kwargs: Any,
    ) -> ChatMessage:
        """Answer a chat; the text ends before the first of `stop_sequences`, calls of the tools come beside it, too.

        Raises `ConfigError` for a `response_format` and unknown options, `InputError` for content that is not text.
        """
        chat, how = self._request(messages, stop_sequences, response_format, tools_to_call_from, kwargs)
        answer = self.dnd.complete(chat, **how)
        return ChatMessage(
            role=MessageRole.ASSISTANT,
            content=answer.text,
            tool_calls=_calls(answer.text, tools_to_call_from),
            raw={"adapter": answer.adapter, "decision": answer.decision},
            token_usage=_usage(answer.usage),
        )

    def generate_stream(
        self,
        messages: list[ChatMessage | dict[str, Any]],
        stop_sequences: list[str] | None = None,
        response_format: dict[str, str] | None = None,
        tools_to_call_from: list[Tool] | None = None,
        **kwargs: Any,
    ) -> Generator[ChatMessageStreamDelta, None, None]:
        """`generate` piece by piece, then its calls and usage; closing it ends the work within a token."""
        chat, how = self._request(messages, stop_sequences, response_format, tools_to_call_from, kwargs)
        with self.dnd.stream(chat, **how) as stream:
            for piece in stream:
                yield ChatMessageStreamDelta(content=piece)
            answer = stream.result
            calls = _calls(answer.text, tools_to_call_from) or []
            yield ChatMessageStreamDelta(
                content="", tool_calls=[*map(_delta, count(), calls)] or None, token_usage=_usage(answer.usage)
            )

    def parse_tool_calls(self, message: ChatMessage) -> ChatMessage:
        """What an answer without calls of known tools comes to; raises as smolagents does when that is nothing."""
        text = message.content or ""
        if not message.tool_calls:
            calls = read_answer(text, None).calls
            if not calls and self.text_is_final and text.strip() and "{" not in text:
                calls = (ToolCall(FINAL_ANSWER, {"answer": text}),)
            message.tool_calls = [_tool_call(c) for c in calls] or None
        return super().parse_tool_calls(message)

    def _request(
        self,
        messages: Sequence[ChatMessage | dict[str, Any]],
        stop_sequences: list[str] | None,
        response_format: dict[str, str] | None,
        tools: list[Tool] | None,
        given: dict[str, Any],
    ) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """The chat, and how to answer it."""
        if response_format is not None:
            raise ConfigError("structured output is not supported", fix="leave out response_format")
        _check_lists(messages, tools)
        asked = self._prepare_completion_kwargs(
            [_in_parts(m, i) for i, m in enumerate(messages)],
            stop_sequences,
            tools_to_call_from=[t for t in tools or () if not (self.text_is_final and t.name == FINAL_ANSWER)],
            tool_choice=None,
            **given,
        )
        chat = [_joined(m) for m in asked.pop("messages")]
        # a blank system message says nothing, but would displace the one the base's template has of its own
        chat = [m for m in chat if m["role"] != "system" or m["content"].strip()]
        schemas = asked.pop("tools", None)
        shown = schemas if self.dnd.engine.shows_tools else None
        how = self._options(asked)
        if how["adapter"] == AUTO:
            how["adapter"] = self._routed(chat, shown)
        return chat, how | {"tools": shown}

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        defaults = asdict(SamplingOptions(max_new_tokens=MAX_NEW_TOKENS)) | {"adapter": self.adapter}
        adapter, sampling = call_options(defaults, given, "DnDModel")
        return {"adapter": adapter, **sampling}

    def _routed(self, chat: list[dict[str, str]], tools: list[dict[str, Any]] | None) -> AdapterChoice:
        """By the task, the first user message: the later ones are what the agent's tools returned."""
        task = next((m["content"] for m in chat if m["role"] == "user"), "")
        if not task.strip():
            return None
        return AUTO if tools else self.dnd.route(task).adapter  # with tools the session has a rule of its own


def _in_parts(message: ChatMessage | dict[str, Any], row: int) -> ChatMessage:
    """The message with its content as a list of texts, the form that smolagents can join."""
    try:
        whole = ChatMessage.from_dict(dict(message)) if isinstance(message, dict) else message
        MessageRole(whole.role)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"message {row} is none of smolagents: {shown(message)}", fix="pass a ChatMessage") from e
    content = "" if whole.content is None else whole.content
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        raise InputError(f"message {row} has a content that is no text and no list of parts: {shown(content)}")
    kinds = [shown(p.get("type")) for p in parts if not _is_text(p)]
    if kinds:
        raise InputError(f"message {row} has a part of type {kinds[0]}, the base reads text only", fix="leave it out")
    return replace(whole, content=parts)


def _is_text(part: dict[str, Any]) -> bool:
    kind = part.get("type")
    return isinstance(kind, str) and kind == "text" and isinstance(part.get("text"), str)


def _check_lists(messages: object, tools: object) -> None:
    if not isinstance(messages, list | tuple):
        raise InputError(f"messages must be a list, got {shown(messages)}", fix="pass [ChatMessage, ...]")
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(t, Tool) for t in tools)):
        raise InputError(f"tools_to_call_from must be a list of smolagents' tools, got {shown(tools)}")


def _joined(message: dict[str, Any]) -> dict[str, str]:
    text = "\n".join(part["text"] for part in message["content"])
    return {"role": MessageRole(message["role"]).value, "content": text}


def _calls(text: str, tools: Sequence[Tool] | None) -> list[ChatMessageToolCall] | None:
    """The calls of these tools in an answer; None without any."""
    # smolagents' own schemas say "string" of what may be anything, such as a final answer
    offered = [{"function": {"name": t.name, "parameters": {"properties": t.inputs}}} for t in tools or ()]
    return [_tool_call(c) for c in read_answer(text, offered).calls] or None


def _tool_call(call: ToolCall) -> ChatMessageToolCall:
    function = ChatMessageToolCallFunction(name=call.name, arguments=call.arguments)
    return ChatMessageToolCall(id=str(uuid.uuid4()), type="function", function=function)


def _delta(index: int, call: ChatMessageToolCall) -> ChatMessageToolCallStreamDelta:
    """The whole call as its only piece; pieces have their arguments as JSON, to be put together."""
    function = replace(call.function, arguments=json.dumps(call.function.arguments))
    return ChatMessageToolCallStreamDelta(index, call.id, call.type, function)


def _usage(usage: dict[str, int]) -> TokenUsage:
    return TokenUsage(input_tokens=usage["prompt_tokens"], output_tokens=usage["completion_tokens"])
