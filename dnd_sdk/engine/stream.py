"""Text as it is generated: whoever runs the model feeds it, the consumer iterates.

The feeding side holds no reference to the stream object, so a stream that is dropped without being read ends too:
dropping cancels, and the adapter is given back within a token. Nobody waits while a stream is collected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType

from dnd_sdk.engine.text import Generation

Emit = Callable[[str], None]
"""Told each new piece of a text."""

Ended = Callable[[Generation | BaseException], None]
"""Told once what came of a request; called by the thread that runs the model, so it must not take long."""


def resolving(future: Future[Generation]) -> Ended:
    """What gives `future` the outcome, unless nobody wants it any more."""

    def ended(outcome: Generation | BaseException) -> None:
        if future.set_running_or_notify_cancel():
            if isinstance(outcome, Generation):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    return ended


class TextFeed:
    """Where a stream's text comes in."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        """Nobody wants the rest."""
        self.items: SimpleQueue[str | Generation | BaseException] = SimpleQueue()

    def emit(self, text: str) -> None:
        """The next piece."""
        self.items.put(text)

    def end(self, outcome: Generation | BaseException) -> None:
        """What came of it; nothing follows."""
        self.items.put(outcome)


class TextStream:
    """Iterator over pieces of one completion; joined they are the whole text. Also a context manager."""

    def __init__(self, feed: TextFeed) -> None:
        self.generation: Generation | None = None
        """The summed-up completion, once the iteration has ended."""
        self._feed, self._ended = feed, False

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        item = self._feed.items.get()
        if isinstance(item, str):
            return item
        self._ended = True
        if isinstance(item, Generation):
            self.generation = item
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop generating (within a token) and iterating; harmless when the stream has ended."""
        self._feed.closed.set()
        self._ended = True

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._feed.closed.set()
