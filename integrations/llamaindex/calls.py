"""Streams that end with their reader.

LlamaIndex's own stream wrapper does not close the generator it wraps, and whoever keeps an event keeps that generator
alive. So each stream carries an event (`threading.Event`) that the outermost generator sets when its reader leaves.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_ended: ContextVar[threading.Event | None] = ContextVar("dnd_call_ended", default=None)


def reader_leaves() -> threading.Event | None:
    """The event of the stream that is being made here; None: none is."""
    return _ended.get()


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
