"""An event loop in a thread of its own: many requests on their way, and one thread that waits for all of them."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class EventLoop:
    """Runs until nobody refers to it; its thread does not keep a program from ending."""

    def __init__(self, name: str) -> None:
        loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(loop,), name=name, daemon=True).start()
        self._loop = loop
        weakref.finalize(self, loop.call_soon_threadsafe, loop.stop).atexit = False

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin `work`; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What comes of `work`; for other threads than the loop's own, which would wait for itself."""
        return self.start(work).result()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()
