"""Completions as server-sent events, chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from dnd_sdk.chat import Reading, plain_so_far
from dnd_sdk.server.answering import Answers, Piece
from dnd_sdk.server.problems import problem_of
from dnd_sdk.server.reading import Asked
from dnd_sdk.server.wire import event
from dnd_sdk.server.writing import (
    chat_logprobs,
    new_id,
    reading_of,
    reason_of,
    text_logprobs,
    usage_of,
    wire_calls,
)
from dnd_sdk.session import Completion


@dataclass
class _Said:
    """What of one choice is known, and what of it was sent."""

    text: str = ""
    n_sent: int = 0
    whole: Completion | None = None

    def new(self, up_to: str) -> str:
        """What `up_to` has beyond what was sent, which is noted as sent."""
        piece = up_to[self.n_sent :]
        self.n_sent = max(self.n_sent, len(up_to))
        return piece


@dataclass
class Chunks:
    """The chunks of one stream."""

    answers: Answers
    asked: Asked
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._id = new_id("chatcmpl" if self.is_chat else "cmpl")
        self._said = [_Said() for _ in range(self.asked.n_choices)]
        self._n_over = 0

    async def events(self) -> AsyncIterator[bytes]:
        """All of them; an error ends the stream as an event of its own."""
        try:
            for i in range(self.asked.n_choices):
                if (head := self._head(i)) is not None:
                    yield event(self._chunk([head]))
            async for piece in self.answers.pieces():
                for chunk in self._of(piece):
                    yield event(chunk)
            if self.asked.include_usage:
                yield event({**self._chunk([]), "usage": self._usage(), "dnd": self.answers.route})
        except Exception as error:
            yield event(problem_of(error).body)
            return
        yield event("[DONE]")

    def _head(self, i: int) -> dict[str, Any] | None:
        if self.is_chat:
            return self._choice(i, {"role": "assistant", "content": ""})
        return self._choice(i, self.asked.echo[i // self.asked.n]) if self.asked.echo else None

    def _of(self, piece: Piece) -> list[dict[str, Any]]:
        said = self._said[piece.choice]
        if piece.completion is not None:
            return self._end(piece.choice, said, piece.completion)
        said.text += piece.text
        text = said.new(plain_so_far(said.text) if self.asked.tools else said.text)
        return [self._chunk([self._text(piece.choice, text)])] if text else []

    def _end(self, i: int, said: _Said, answer: Completion) -> list[dict[str, Any]]:
        said.whole = answer
        reading = reading_of(answer, self.asked)
        chunks = []
        rest = said.new(reading.text)
        if rest or answer.logprobs is not None:  # of all its tokens at once: pieces of text are none of them
            told = chat_logprobs(answer) if self.is_chat else text_logprobs(answer)
            chunks.append(self._chunk([{**self._text(i, rest), "logprobs": told}]))
        if reading.calls:
            calls = [{"index": k, **call} for k, call in enumerate(wire_calls(reading.calls))]
            chunks.append(self._chunk([self._choice(i, {"tool_calls": calls})]))
        return [*chunks, self._last(i, answer, reading)]

    def _last(self, i: int, answer: Completion, reading: Reading) -> dict[str, Any]:
        self._n_over += 1
        last = self._choice(i, {} if self.is_chat else "")
        chunk = self._chunk([{**last, "finish_reason": reason_of(answer, reading)}])
        # usage exactly once: some clients add up all they see, others fetch a tokenizer where they see none
        if self._n_over == self.asked.n_choices and not self.asked.include_usage:
            chunk |= {"usage": self._usage(), "dnd": self.answers.route}
        return chunk

    def _usage(self) -> dict[str, Any]:
        return usage_of([said.whole for said in self._said if said.whole is not None], self.asked.n)

    def _text(self, i: int, text: str) -> dict[str, Any]:
        return self._choice(i, {"content": text} if self.is_chat else text)

    def _choice(self, i: int, news: Any) -> dict[str, Any]:
        return {"index": i, "delta" if self.is_chat else "text": news, "logprobs": None, "finish_reason": None}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "choices": choices,
        }
