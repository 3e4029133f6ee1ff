"""A backend without a model, for tests of what is built around one; loads no torch."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dnd_sdk.chat import checked_chat, checked_tools, tools_not_shown
from dnd_sdk.engine.backend import Backend
from dnd_sdk.engine.stream import TextFeed, TextStream
from dnd_sdk.engine.text import Generation, RowText
from dnd_sdk.errors import AdapterNotFoundError, InputError

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

    def hold(self, adapter: Adapter, load: Callable[[], Tensor]) -> None:
        """Know the adapter; its weights are not asked for."""
        self.held[adapter.id] = adapter

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

    def stream(self, request: CompletionRequest) -> TextStream:
        """See `Backend.stream`."""
        n_prompt = self._checked(request)
        self.requests.append(request)
        feed = TextFeed()
        threading.Thread(target=self._feed, args=(request, n_prompt, feed), name="dnd-fake").start()
        return TextStream(feed)

    def _feed(self, request: CompletionRequest, n_prompt: int, feed: TextFeed) -> None:
        try:
            feed.end(self._say(request, n_prompt, feed.emit, feed.closed))
        except BaseException as error:  # the consumer must hear of everything, it waits
            feed.end(error)

    def _checked(self, request: CompletionRequest) -> int:
        """How many words the prompt has."""
        chat = checked_chat(request.chat)
        if checked_tools(request.tools) and not self._shows_tools:
            raise tools_not_shown()
        n_prompt, n_new = sum(len(m["content"].split()) for m in chat) or 1, request.options.max_new_tokens
        if n_prompt + n_new > self._context_tokens:
            raise InputError(
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
        emit: Callable[[str], None] | None = None,
        closed: threading.Event | None = None,
    ) -> Generation:
        words, options = _Words(), request.options
        text = RowText(words, frozenset({_END}), options.stop, emit, max_new_tokens=options.max_new_tokens)
        for token in words.tokens(self._answer(request)):
            if request.cancelled or (closed is not None and closed.is_set()):
                text.cancel(text.n_tokens)
            if text.feed([token]):
                break
        return text.result(n_prompt)

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
