"""LangChain messages to the chat a `DnD` takes, and its answers back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    ToolCall,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk

from dnd_sdk.chat import new_call_id
from dnd_sdk.errors import InputError, shown
from dnd_sdk.session import Completion, Part

Chat = list[dict[str, Any]]
"""Messages of `role` and `content`, oldest first; see `chat.template.Messages`."""

_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}
_CHAT_ROLES = {"developer": "system", "model": "assistant", **_ROLES}
"""Of a `ChatMessage`, which names its role itself; the others are their own."""
_UNSAID = (
    *("tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call", "input_json_delta"),
    *("reasoning", "thinking", "redacted_thinking"),
)
"""Types of content that are no part of what was said; calls stand beside it."""


def to_chat(messages: Sequence[BaseMessage]) -> Chat:
    """The messages with their calls and results. Raises `InputError` for content that is not text."""
    chat: Chat = []
    names: dict[str | None, str] = {}
    for row, message in enumerate(messages):
        plain: dict[str, Any] = {"role": _role(message), "content": _text(message, row)}
        if isinstance(message, AIMessage) and message.tool_calls:
            plain["tool_calls"] = [_wire_call(c) for c in message.tool_calls]
            names |= {c["id"]: c["name"] for c in message.tool_calls}
        if isinstance(message, ToolMessage):
            plain |= {"tool_call_id": message.tool_call_id, "name": message.name or names.get(message.tool_call_id)}
        chat.append(plain)
    return chat


def whole_message(whole: Part, model: str) -> AIMessage:
    """A whole answer of the base `model`."""
    assert whole.completion is not None
    return AIMessage(
        content=whole.text,
        tool_calls=[tool_call(name=c.name, args=c.arguments, id=new_call_id()) for c in whole.calls],
        usage_metadata=_usage(whole.completion),
        response_metadata=_metadata(whole.completion, model),
    )


def chunk(part: Part, model: str) -> AIMessageChunk:
    """A piece of an answer; the last one has no text but all else."""
    if part.completion is None:
        return AIMessageChunk(content=part.delta)
    calls = [
        tool_call_chunk(name=c.name, args=json.dumps(c.arguments, ensure_ascii=False), id=new_call_id(), index=i)
        for i, c in enumerate(part.calls)
    ]
    return AIMessageChunk(
        content="",
        tool_call_chunks=calls,
        usage_metadata=_usage(part.completion),
        response_metadata=_metadata(part.completion, model),
        chunk_position="last",
    )


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return _CHAT_ROLES.get(message.role, message.role)
    return _ROLES.get(message.type.removesuffix("MessageChunk").lower(), message.type)


def _text(message: BaseMessage, row: int) -> str:
    content: str | Iterable[str | dict[str, Any]] = message.content
    if isinstance(content, str):
        return content
    said = []
    for block in content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if kind in _UNSAID:
            continue
        text = block if isinstance(block, str) else block.get("text")
        if kind != "text" or not isinstance(text, str):
            raise InputError(
                f"message {row} ({message.type}) has a part of type {shown(kind)}, the base reads text only",
                fix="leave it out, or put what it says into text",
            )
        said.append(text)
    return "\n".join(said)


def _wire_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["args"]}
    return {"type": "function", "id": call["id"] or new_call_id(), "function": function}


def _usage(answer: Completion) -> UsageMetadata:
    read, written = answer.usage["prompt_tokens"], answer.usage["completion_tokens"]
    return UsageMetadata(input_tokens=read, output_tokens=written, total_tokens=read + written)


def _metadata(answer: Completion, model: str) -> dict[str, Any]:
    told: dict[str, Any] = {
        "model_name": model,
        "model_provider": "dnd",
        "finish_reason": answer.finish_reason,
        "adapter": answer.adapter,
        "decision": answer.decision,
    }
    if answer.logprobs is None:
        return told
    tokens = [
        {
            "token": t.text,
            "logprob": t.logprob,
            "top_logprobs": [{"token": text, "logprob": logprob} for text, logprob in t.likeliest],
        }
        for t in answer.logprobs
    ]
    return {**told, "logprobs": {"content": tokens}}
