"""A backend without a model, for tests of what is built around one; loads no torch."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dnd_sdk.chat import checked_chat, checked_tools, tools_not_shown
from dnd_sdk.engine.backend import Backend
from dnd_sdk.engine.stream import Emit, Ended, TextFeed, TextStream, resolving
from dnd_sdk.engine.text import Generation, RowText
from dnd_sdk.errors import AdapterNotFoundError, ContextLengthError

if TYPE_CHECKING:
    from torch import Tensor

    from dnd_sdk.adapters import Adapter
    from dnd_sdk.engine.request import CompletionRequest
    from dnd_sdk.lora import LoraLayout

Answer = Callable[["CompletionRequest"], str | Iterable[str]]
"""What is said to a request: a text, whose words are its tokens, or its tokens one by one, made as they are read."""

_WORD = re.compile(r"\s*\S+|\s+$")
_END = -1


class FakeBackend(Backend):
    """Answers in words, one a token, and keeps to the contract of a backend: adapters, limits, stops and cancels.

    The same request has the same answer, whatever its sampling: by default the adapter's name (or "base") and what the
    last message says.
    """

    local = None

    def __init__(
        self,
        layout: LoraLayout,
        answer: Answer | None = None,
        *,
        context_tokens: int = 4096,
        shows_tools: bool = True,
        has_chat_template: bool = True,
    ) -> None:
        """`answer` may be called by several threads; None: the default described above."""
        self._layout, self._context_tokens = layout, context_tokens
        self._shows_tools, self._has_chat_template = shows_tools, has_chat_template
        self._answer = answer or self._echo
        self.held: dict[str, Adapter] = {}
        """Adapters by id."""
        self.requests: list[CompletionRequest] = []
        """All that were answered, refused ones left out."""
        self._n_running, self._counted = 0, threading.Lock()

    @property
    def layout(self) -> LoraLayout:
        """As given."""
        return self._layout

    @property
    def context_tokens(self) -> int:
        """As given."""
        return self._context_tokens

    @property
    def shows_tools(self) -> bool:
        """As given."""
        return self._shows_tools

    @property
    def has_chat_template(self) -> bool:
        """As given."""
        return self._has_chat_template

    @property
    def n_running(self) -> int:
        """See `Backend.n_running`."""
        return self._n_running

    @property
    def n_waiting(self) -> int:
        """None ever does."""
        return 0

    def resident(self) -> list[str]:
        """Ids of the adapters that are held, in the order they came."""
        return list(self.held)

    def hold(self, adapter: Adapter, load: Callable[[], Tensor]) -> None:
        """Know the adapter; its weights are not asked for."""
        self.held[adapter.id] = adapter

    def pin(self, adapter_id: str, pinned: bool) -> None:
        """See `Backend.pin`; nothing ever gives way."""
        if adapter_id not in self.held:
            raise AdapterNotFoundError(f"adapter {adapter_id!r} is not held", fix="hold it before pinning")

    def forget(self, adapter_id: str) -> None:
        """Know it no more."""
        self.held.pop(adapter_id, None)

    def close(self) -> None:
        """Forget all adapters."""
        self.held.clear()

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Generation]:
        """See `Backend.complete`."""
        lengths = [self._checked(request) for request in requests]
        self.requests.extend(requests)
        return [self._say(request, n) for request, n in zip(requests, lengths, strict=True)]

    def submit(self, request: CompletionRequest, emit: Emit | None = None) -> Future[Generation]:
        """See `Backend.submit`."""
        n_prompt = self._checked(request)
        self.requests.append(request)
        future, unwanted = Future[Generation](), threading.Event()
        future.add_done_callback(lambda done: unwanted.set() if done.cancelled() else None)
        self._start(request, n_prompt, resolving(future), emit, unwanted)
        return future

    def stream(self, request: CompletionRequest) -> TextStream:
        """See `Backend.stream`."""
        n_prompt = self._checked(request)
        self.requests.append(request)
        feed = TextFeed()
        self._start(request, n_prompt, feed.end, feed.emit, feed.closed)
        return TextStream(feed)

    def _start(
        self,
        request: CompletionRequest,
        n_prompt: int,
        ended: Ended,
        emit: Emit | None,
        closed: threading.Event,
    ) -> None:
        def run() -> None:
            try:
                outcome: Generation | BaseException = self._say(request, n_prompt, emit, closed)
            except BaseException as error:  # the consumer must hear of everything, it waits
                outcome = error
            ended(outcome)

        threading.Thread(target=run, name="dnd-fake").start()

    def _checked(self, request: CompletionRequest) -> int:
        """How many words the prompt has."""
        chat = checked_chat(request.chat)
        if checked_tools(request.tools) and not self._shows_tools:
            raise tools_not_shown()
        n_prompt = sum(len(m["content"].split()) for m in chat) or 1
        n_new = 1 if request.may_clip else request.options.max_new_tokens
        if n_prompt + n_new > self._context_tokens:
            raise ContextLengthError(
                f"the prompt has {n_prompt} words, at most {self._context_tokens - n_new} fit",
                fix="shorten the prompt or lower max_new_tokens",
            )
        if request.adapter_id is not None and request.adapter_id not in self.held:
            raise AdapterNotFoundError(f"adapter {request.adapter_id!r} is not held", fix="hold it (again)")
        return n_prompt

    def _say(
        self,
        request: CompletionRequest,
        n_prompt: int,
        emit: Emit | None = None,
        closed: threading.Event | None = None,
    ) -> Generation:
        words, options = _Words(), request.options
        n_new = min(options.max_new_tokens, self._context_tokens - n_prompt)
        text = RowText(words, frozenset({_END}), options.stop, emit, max_new_tokens=n_new)
        with self._counting():
            for token in words.tokens(self._answer(request)):
                if request.cancelled or (closed is not None and closed.is_set()):
                    text.cancel(text.n_tokens)
                if text.feed([token]):
                    break
        return text.result(n_prompt)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        with self._counted:
            self._n_running += 1
        try:
            yield
        finally:
            with self._counted:
                self._n_running -= 1

    def _echo(self, request: CompletionRequest) -> str:
        adapter = None if request.adapter_id is None else self.held.get(request.adapter_id)
        return f"{'base' if adapter is None else adapter.name}: {checked_chat(request.chat)[-1]['content']}"


class _Words:
    """The tokenizer of an answer that is being made: token i is its i-th word."""

    def __init__(self) -> None:
        self._words: list[str] = []

    def tokens(self, answer: str | Iterable[str]) -> Iterator[int]:
        """Its tokens and the one that ends it."""
        for word in _WORD.findall(answer) if isinstance(answer, str) else answer:
            self._words.append(word)
            yield len(self._words) - 1
        yield _END

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Their text."""
        return "".join(self._words[i] for i in token_ids)

    def convert_tokens_to_ids(self, tokens: str) -> None:
        """None: a word is whole, there are no tokens of single bytes."""
