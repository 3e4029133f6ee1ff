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
)

from dnd_sdk.errors import InputError
from dnd_sdk.integrations.llamaindex.calls import Part
from dnd_sdk.session import Completion

Chat = list[dict[str, str]]
"""Messages of `role` and `content`, oldest first."""

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


def user_message(text: str) -> Chat:
    """A chat of one user message."""
    return [{"role": "user", "content": text}]


def last_user_text(chat: Chat) -> str:
    """What a request is about: its last user message; empty when there is none."""
    return next((m["content"] for m in reversed(chat) if m["role"] == "user"), "")


def completion_response(answer: Completion) -> CompletionResponse:
    """A whole completion."""
    return CompletionResponse(text=answer.text, raw=_raw(answer))


def chat_response(answer: Completion) -> ChatResponse:
    """A whole chat answer."""
    return ChatResponse(message=_assistant(answer.text), raw=_raw(answer))


def completion_part(part: Part) -> CompletionResponse:
    """A piece of a streamed completion."""
    return CompletionResponse(text=part.text, delta=part.delta, raw=_raw(part.completion))


def chat_part(part: Part) -> ChatResponse:
    """A piece of a streamed chat answer."""
    return ChatResponse(message=_assistant(part.text), delta=part.delta, raw=_raw(part.completion))


def _text(message: ChatMessage, row: int) -> str:
    other = [type(b).__name__ for b in message.blocks if not isinstance(b, TextBlock)]
    if other:
        raise InputError(
            f"message {row} ({message.role.value}) has a {other[0]}, the base reads text only",
            fix="leave it out, or put what it says into a TextBlock",
        )
    return message.content or ""


def _assistant(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def _raw(answer: Completion | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    usage = {**answer.usage, "total_tokens": sum(answer.usage.values())}
    return {"usage": usage, "dnd": {"adapter": answer.adapter, "decision": answer.decision}}
