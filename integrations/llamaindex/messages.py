"""LlamaIndex messages to the chat a `DnD` takes, and its answers back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)

from dnd_sdk.chat import ToolCall, new_call_id
from dnd_sdk.errors import InputError
from dnd_sdk.session import Completion, Part

Chat = list[dict[str, Any]]
"""Messages of `role` and `content`, oldest first; see `chat.template.Messages`."""

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}
"""Roles by the name that chat templates know them by; the others are their own."""


def to_chat(messages: Sequence[ChatMessage]) -> Chat:
    """The messages as plain text. Raises `InputError` for content that is not text."""
    return [{"role": _ROLES.get(m.role, m.role.value), "content": _text(m, i)} for i, m in enumerate(messages)]


def to_tool_chat(messages: Sequence[ChatMessage]) -> Chat:
    """`to_chat` that keeps the calls of tools, and which call and tool a result belongs to."""
    chat: Chat = []
    names: dict[Any, str] = {}
    for message, plain in zip(messages, to_chat([_without_calls(m) for m in messages]), strict=True):
        calls = [_wire_call(b) for b in message.blocks if isinstance(b, ToolCallBlock)]
        names |= {c["id"]: c["function"]["name"] for c in calls}
        answered = message.additional_kwargs.get("tool_call_id")
        result = {"tool_call_id": answered, "name": names.get(answered)} if plain["role"] == "tool" else {}
        chat.append(plain | result | ({"tool_calls": calls} if calls else {}))
    return chat


def user_message(text: str) -> Chat:
    """A chat of one user message."""
    return [{"role": "user", "content": text}]


def completion_response(whole: Part) -> CompletionResponse:
    """A whole completion."""
    return CompletionResponse(text=whole.text, raw=_raw(whole.completion))


def chat_response(whole: Part) -> ChatResponse:
    """A whole chat answer."""
    return ChatResponse(message=_assistant(whole), raw=_raw(whole.completion))


def completion_part(part: Part) -> CompletionResponse:
    """A piece of a streamed completion."""
    return CompletionResponse(text=part.text, delta=part.delta, raw=_raw(part.completion))


def chat_part(part: Part) -> ChatResponse:
    """A piece of a streamed chat answer."""
    return ChatResponse(message=_assistant(part), delta=part.delta, raw=_raw(part.completion))


def _text(message: ChatMessage, row: int) -> str:
    other = [type(b).__name__ for b in message.blocks if not isinstance(b, TextBlock)]
    if other:
        raise InputError(
            f"message {row} ({message.role.value}) has a {other[0]}, the base reads text only",
            fix="leave it out, or put what it says into a TextBlock",
        )
    return message.content or ""


def _without_calls(message: ChatMessage) -> ChatMessage:
    return message.model_copy(update={"blocks": [b for b in message.blocks if not isinstance(b, ToolCallBlock)]})


def _wire_call(block: ToolCallBlock) -> dict[str, Any]:
    return {
        "type": "function",
        "id": block.tool_call_id or new_call_id(),
        "function": {"name": block.tool_name, "arguments": block.tool_kwargs},
    }


def _assistant(part: Part) -> ChatMessage:
    said = [TextBlock(text=part.text)] if part.text or not part.calls else []
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=[*said, *(_block(c) for c in part.calls)])


def _block(call: ToolCall) -> ToolCallBlock:
    return ToolCallBlock(tool_call_id=new_call_id(), tool_name=call.name, tool_kwargs=call.arguments)


def _raw(answer: Completion | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    usage = {**answer.usage, "total_tokens": sum(answer.usage.values())}
    return {"usage": usage, "dnd": {"adapter": answer.adapter, "decision": answer.decision}}
