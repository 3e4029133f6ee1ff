"""What the LlamaIndex tests share: one way to call all eight methods, a model that waits for us, and a scripted one."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent

from dnd_sdk.integrations.llamaindex import DnDLLM
from dnd_sdk.session import Completion, DnD

PLAIN = ("complete", "chat", "acomplete", "achat")
STREAMS = ("stream_complete", "stream_chat", "astream_complete", "astream_chat")
METHODS = PLAIN + STREAMS


class Reply(NamedTuple):
    """What came back, whichever method was called."""

    text: str
    raw: Any
    deltas: list[str] | None
    items: list[Any]


def call(llm: DnDLLM, method: str, text: str, **options: Any) -> Any:
    """Call a method by name with one user message."""
    return getattr(llm, method)([ChatMessage(content=text)] if "chat" in method else text, **options)


def ask(llm: DnDLLM, method: str, text: str, **options: Any) -> Reply:
    """The whole answer of a method."""
    got = call(llm, method, text, **options)
    return asyncio.run(aread(got)) if inspect.iscoroutine(got) else reply(got)


async def aread(got: Coroutine[Any, Any, Any]) -> Reply:
    """The answer of an asynchronous method."""
    answer = await got
    return reply([item async for item in answer] if isinstance(answer, AsyncGenerator) else answer)


def reply(got: Any) -> Reply:
    """A response, or the items of a stream."""
    streamed = isinstance(got, Generator | list)
    items = list(got) if streamed else [got]
    last = items[-1]
    text = last.text if hasattr(last, "text") else last.message.content
    return Reply(text, last.raw, [i.delta for i in items] if streamed else None, items)


class Recorder(BaseEventHandler):
    """Keeps every event, as tracing tools do."""

    seen: list[Any] = []

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        """Keep it."""
        self.seen.append(event)

    def named(self, end: str) -> list[str]:
        """Class names of the events whose name ends like this, the LLM's only."""
        names = [type(e).__name__ for e in self.seen]
        return [n for n in names if n.startswith(("LLMChat", "LLMCompletion")) and n.endswith(end)]


@pytest.fixture
def events() -> Iterator[Recorder]:
    """The events fired during a test."""
    recorder, root = Recorder(seen=[]), get_dispatcher()
    root.event_handlers.append(recorder)
    yield recorder
    root.event_handlers.remove(recorder)


def roomy(dnd: DnD) -> DnD:
    """Give a tiny base context enough for LlamaIndex's prompts, which its tokenizer cuts into bytes."""
    dnd.base.model.config.max_position_embeddings = 16_384
    return dnd


class ScriptedStream:
    """Says one text, five characters at a time."""

    def __init__(self, text: str) -> None:
        self._pieces = iter([text[i : i + 5] for i in range(0, len(text), 5)])
        self.result = Completion(text, {"prompt_tokens": 7, "completion_tokens": 3}, None, "base")

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __enter__(self) -> ScriptedStream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class ScriptedDnD:
    """Answers as told, one text a call; stands in where a random base cannot say what a test needs."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.chats = list(texts), []
        self.base = SimpleNamespace(name="scripted", tokenizer=SimpleNamespace(chat_template="x"))
        self.encoder = SimpleNamespace(name="none")
        self.home = SimpleNamespace(root="nowhere")
        self.engine = SimpleNamespace(context_tokens=8192, has_chat_template=True, shows_tools=True)

    def stream(self, chat: Any, adapter: Any, **how: Any) -> ScriptedStream:
        """The next text."""
        self.chats.append((chat, adapter, how))
        return ScriptedStream(self.texts.pop(0))
