"""One call of the LLM, the same for all eight methods: it works in one thread and can be ended from any other.

* LlamaIndex's own stream wrapper does not close the generator it wraps, and whoever keeps an event keeps that generator
  alive. So each stream carries an event (`threading.Event`) that the outermost generator sets when its reader leaves.
* Asynchronous calls work in threads of their own: the event loop's default ones are few and belong to everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any, Generic, NamedTuple, TypeVar

from llama_index.core.bridge.pydantic import ValidationError

from dnd_sdk.chat import ToolCall
from dnd_sdk.errors import ConfigError, InputError, shown
from dnd_sdk.session import Completion, CompletionStream

MAX_THREADS = 32
"""Asynchronous calls at work at a time; more of them wait in line."""

T = TypeVar("T")

_threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="dnd-llamaindex")
_ended: ContextVar[threading.Event | None] = ContextVar("dnd_call_ended", default=None)


class Part(NamedTuple):
    """What a call hands on: a new piece of the answer, or at the end the whole of it."""

    text: str
    """The answer so far."""
    delta: str
    """Its new piece; empty at the end."""
    completion: Completion | None = None
    """Only at the end."""
    calls: tuple[ToolCall, ...] = ()
    """The tools it wants called; only at the end, and only where some were offered."""


class Call:
    """One request; made in the reader's thread, worked on in any one thread."""

    def __init__(self, start: Callable[[threading.Event], CompletionStream], *, held: bool = False) -> None:
        """`start` chooses the adapter and starts the engine, which must stop within a token of the event.

        `held`: the answer is to be whole JSON; `InputError` where `max_new_tokens` cut it.
        """
        self._start, self._held = start, held
        self._end = _ended.get() or threading.Event()

    def answer(self) -> Part:
        """The whole answer."""
        with self._start(self._end) as stream:
            return self._whole(stream.result.text, stream.result)

    def parts(self) -> Iterator[Part]:
        """The answer piece by piece, then once more whole with its usage."""
        text = ""
        with self._start(self._end) as stream:
            for delta in stream:
                text += delta
                yield Part(text, delta)
            yield self._whole(text, stream.result)

    async def aanswer(self) -> Part:
        """`answer` in another thread; cancelling ends it."""
        try:
            return await in_thread(self.answer)
        finally:
            self._end.set()

    async def aparts(self) -> AsyncIterator[Part]:
        """`parts` in another thread, which does not wait for a slow reader; cancelling or closing ends it."""
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[Part | None] = asyncio.Queue()

        def work() -> None:
            try:
                for part in self.parts():
                    loop.call_soon_threadsafe(made.put_nowait, part)
            finally:
                loop.call_soon_threadsafe(made.put_nowait, None)

        job = in_thread(work)
        job.add_done_callback(lambda j: j.cancelled() or j.exception())  # heard, even if the reader has left
        try:
            while (part := await made.get()) is not None:
                yield part
            await job  # raises what the work raised
        finally:
            self._end.set()
            job.cancel()

    def _whole(self, text: str, completion: Completion) -> Part:
        if self._held and completion.finish_reason == "length" and not _is_json(text):
            raise InputError(
                f"max_new_tokens={completion.usage['completion_tokens']} cut the answer before it fits its schema: "
                f"{shown(text)}",
                fix="raise max_new_tokens, or ask for less: bound the schema's strings and lists",
            )
        return Part(text, "", completion)


class Lazy(Generic[T]):
    """A value made on first use, once, whichever threads ask."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._lock = threading.Lock()

    @property
    def is_made(self) -> bool:
        """Whether `get` returns at once."""
        return bool(self._made)

    def get(self) -> T:
        """The value; raises what making it raises, and tries again the next time."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


@contextlib.contextmanager
def as_config_error(owner: str) -> Iterator[None]:
    """Raise what pydantic finds wrong with the fields of `owner` as `ConfigError`."""
    try:
        yield
    except ValidationError as e:
        told = (f"{'.'.join(map(str, p['loc']))}: {p['msg']}, got {shown(p['input'])}" for p in e.errors()[:4])
        raise ConfigError(f"{owner} refuses {'; '.join(told)}") from e


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run `work` in one of our threads, in the caller's context."""
    return asyncio.get_running_loop().run_in_executor(_threads, copy_context().run, work)


def ends_with_its_reader(method: Callable[..., Generator[T, None, None]]) -> Callable[..., Generator[T, None, None]]:
    """Make a method whose stream, closed or dropped by its reader, ends the `Call` that was made in it."""

    @functools.wraps(method)
    def opened(self: Any, *args: Any, **kwargs: Any) -> Generator[T, None, None]:
        end = threading.Event()
        token = _ended.set(end)
        try:
            stream = method(self, *args, **kwargs)
        finally:
            _ended.reset(token)
        return _until_left(stream, end)

    return opened


def aends_with_its_reader(
    method: Callable[..., Coroutine[Any, Any, AsyncGenerator[T, None]]],
) -> Callable[..., Coroutine[Any, Any, AsyncGenerator[T, None]]]:
    """`ends_with_its_reader` for a coroutine that returns an asynchronous generator."""

    @functools.wraps(method)
    async def opened(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[T, None]:
        end = threading.Event()
        token = _ended.set(end)
        try:
            stream = await method(self, *args, **kwargs)
        finally:
            _ended.reset(token)
        return _auntil_left(stream, end)

    return opened


def _until_left(stream: Generator[T, None, None], end: threading.Event) -> Generator[T, None, None]:
    try:
        yield from stream
    finally:
        end.set()


async def _auntil_left(stream: AsyncGenerator[T, None], end: threading.Event) -> AsyncGenerator[T, None]:
    try:
        async with contextlib.aclosing(stream):
            async for item in stream:
                yield item
    finally:
        end.set()
