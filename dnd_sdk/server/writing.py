"""Completions as OpenAI's objects, whole and in chunks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from dnd_sdk.chat import Reading, ToolCall, new_call_id, read_answer
from dnd_sdk.server.reading import Asked
from dnd_sdk.session import Completion

_REASONS = {"cancelled": "stop"}


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def usage_of(answers: Sequence[Completion], n: int) -> dict[str, Any]:
    """Of all choices together: each prompt counts once, however many answers it has."""
    prompt = sum(answer.usage["prompt_tokens"] for answer in answers[::n])
    written = sum(answer.usage["completion_tokens"] for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def reading_of(answer: Completion, asked: Asked) -> Reading:
    """Its text and its calls of tools."""
    if not asked.tools:
        return Reading(answer.text, ())
    reading = read_answer(answer.text, asked.tools)
    return Reading(reading.text, reading.calls[:1]) if asked.one_call else reading


def chat_choice(i: int, answer: Completion, asked: Asked) -> dict[str, Any]:
    """One choice of a whole chat completion."""
    reading = reading_of(answer, asked)
    message: dict[str, Any] = {"role": "assistant", "content": reading.text, "refusal": None}
    if reading.calls:
        message |= {"content": reading.text or None, "tool_calls": wire_calls(reading.calls)}
    reason = reason_of(answer, reading)
    return {"index": i, "message": message, "logprobs": chat_logprobs(answer), "finish_reason": reason}


def text_choice(i: int, answer: Completion, asked: Asked) -> dict[str, Any]:
    """One choice of a whole text completion."""
    head = asked.echo[i // asked.n] if asked.echo else ""
    reason = reason_of(answer, Reading(answer.text, ()))
    return {"index": i, "text": head + answer.text, "logprobs": text_logprobs(answer), "finish_reason": reason}


def reason_of(answer: Completion, reading: Reading) -> str:
    """Why it ends, in OpenAI's words."""
    return "tool_calls" if reading.calls else _REASONS.get(answer.finish_reason, answer.finish_reason)


def wire_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls of tools."""
    return [
        {
            "id": new_call_id(),
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]


def chat_logprobs(answer: Completion) -> dict[str, Any] | None:
    """Of a chat's tokens."""
    if answer.logprobs is None:
        return None
    return {
        "content": [
            {**_token(t.text, t.logprob), "top_logprobs": [_token(*other) for other in t.likeliest]}
            for t in answer.logprobs
        ],
        "refusal": None,
    }


def text_logprobs(answer: Completion) -> dict[str, Any] | None:
    """Of a text's tokens, in the older form."""
    if answer.logprobs is None:
        return None
    starts, at = [], 0
    for token in answer.logprobs:
        starts.append(at)
        at += len(token.text)
    return {
        "tokens": [token.text for token in answer.logprobs],
        "token_logprobs": [token.logprob for token in answer.logprobs],
        "top_logprobs": [dict(token.likeliest) for token in answer.logprobs],
        "text_offset": starts,
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
