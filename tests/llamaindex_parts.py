"""What the LlamaIndex tests share: one way to call all eight methods, a model that waits for us, and a scripted one."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from engine_parts import generating as generating
from helpers import random_flat
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


class Pace:
    """A model that makes one token per `allow`; a test that never allows fails instead of hanging."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens = 0
        self._permits = threading.Semaphore(0)
        real = model.forward

        @functools.wraps(real)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._permits.acquire(timeout=10):
                raise TimeoutError("nobody allowed the next token: is the event loop blocked?")
            self.tokens += 1
            return real(*args, **kwargs)

        model.forward = forward

    def allow(self, n: int = 100_000) -> None:
        """Let `n` more tokens be made."""
        self._permits.release(n)


async def cancel_after(tokens: int, work: Coroutine[Any, Any, Any], pace: Pace) -> None:
    """Cancel an answer when it has so many tokens; whoever waits for it must be told."""
    task = asyncio.create_task(work)
    pace.allow(tokens)
    while pace.tokens < tokens and not task.done():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def roomy(dnd: DnD) -> DnD:
    """Give a tiny base context enough for LlamaIndex's prompts, which its tokenizer cuts into bytes."""
    dnd.base.model.config.max_position_embeddings = 16_384
    return dnd


def endless(dnd: DnD) -> DnD:
    """Make a tiny base never end its answer by itself."""
    with torch.no_grad():
        dnd.base.model.get_output_embeddings().weight[dnd.base.tokenizer.eos_token_id] = 0.0
    return dnd


def put_adapter(dnd: DnD, name: str, seed: int) -> None:
    """Store random weights that change a tiny base's answers."""
    flat = random_flat(dnd.layout, seed=seed, std=0.3)
    dnd.store.put(
        flat, dnd.layout, base_name="tiny", base_fingerprint=dnd.base.fingerprint, source="trained", name=name
    )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait at most 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


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
