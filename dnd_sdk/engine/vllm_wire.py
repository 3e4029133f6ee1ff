"""A request in vLLM's words, and its streamed answer in ours."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from dnd_sdk.chat import checked_chat, checked_tools, new_call_id
from dnd_sdk.engine.stream import Emit
from dnd_sdk.engine.text import FinishReason, Generation, TokenLogprob

if TYPE_CHECKING:
    from dnd_sdk.engine.request import CompletionRequest

_SEEDS = 2**63


def body_of(request: CompletionRequest) -> dict[str, Any]:
    """What `/v1/chat/completions` is asked, but for the model; raises `InputError` for a chat or tools that are none.

    Every sampling option is said: where one is left out, vLLM takes what the base's own configuration advises.
    """
    options, tools = request.options, checked_tools(request.tools)
    body: dict[str, Any] = {
        "messages": [_message(m) for m in checked_chat(request.chat)],
        "stream": True,
        # also in the middle of an answer, since it may be cancelled there
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    if options.stop:
        body["stop"] = list(options.stop)
    if options.seed is not None:
        body["seed"] = options.seed % _SEEDS
    if options.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": options.logprobs}
    if options.schema is not None:
        held = {"name": "answer", "schema": json.loads(options.schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": held}
    if tools:
        # with "none" the base is shown the tools all the same, and its calls come back as it writes them, which is how
        # `chat.read_answer` takes them; with "auto" vLLM asks for a parser of its own
        body |= {"tools": tools, "tool_choice": "none"}
    return body


class AnswerSoFar:
    """What has come of an answer."""

    def __init__(self, emit: Emit | None) -> None:
        """`emit` is told each new piece of text."""
        self.text = ""
        self.began = False
        """Whether the server has begun to answer."""
        self.heard = time.monotonic()
        """When the server last said anything."""
        self._emit, self._usage = emit, dict[str, Any]()
        self._reason: str | None = None
        self._logprobs: list[TokenLogprob] = []

    def take(self, chunk: dict[str, Any]) -> None:
        """The next object of the stream."""
        self.began, self.heard = True, time.monotonic()
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            self._reason = choice.get("finish_reason") or self._reason
            self._logprobs += map(_logprob, (choice.get("logprobs") or {}).get("content") or ())
            piece = (choice.get("delta") or {}).get("content")
            if piece:
                self.text += piece
                if self._emit is not None:
                    self._emit(piece)

    def result(self, request: CompletionRequest, *, cancelled: bool = False) -> Generation:
        """Summed up."""
        reason: FinishReason = "length" if self._reason == "length" else "stop"
        cached = (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Generation(
            self.text,
            int(self._usage.get("prompt_tokens") or 0),
            int(self._usage.get("completion_tokens") or 0),
            "cancelled" if cancelled or self._reason == "abort" else reason,
            int(cached),
            None if request.options.logprobs is None else tuple(self._logprobs),
        )


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its calls as OpenAI writes them: with ids, and arguments as text."""
    if "tool_calls" not in message:
        return message
    calls = [
        {
            "type": "function",
            **call,
            "id": call.get("id") or new_call_id(),
            "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])},
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _logprob(token: dict[str, Any]) -> TokenLogprob:
    likeliest = tuple((t["token"], float(t["logprob"])) for t in token.get("top_logprobs") or ())
    return TokenLogprob(token["token"], float(token["logprob"]), likeliest)


class Work:
    """One request on its way."""

    def __init__(
        self,
        request: CompletionRequest,
        body: dict[str, Any],
        closed: threading.Event,
        taken: Future[None],
        answer: AnswerSoFar,
    ) -> None:
        self.request, self.body, self.answer = request, body, answer
        self._closed, self._taken = closed, taken
        self._until = None if request.deadline_s is None else time.monotonic() + request.deadline_s

    @property
    def is_over(self) -> bool:
        """Whether nobody wants the rest."""
        late = self._until is not None and time.monotonic() >= self._until
        return late or self._closed.is_set() or self.request.cancelled

    def take_up(self, error: BaseException | None = None) -> None:
        """Say that the server has it, or never will."""
        if self._taken.done():
            return
        if error is None:
            self._taken.set_result(None)
        else:
            self._taken.set_exception(error)
