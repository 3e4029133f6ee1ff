"""Text as it is generated: a thread runs the model, the consumer iterates.

The thread holds no reference to the stream object, so a stream that is dropped without being read ends too: dropping
cancels, and the thread gives its adapter back within a token. Nobody waits for the thread while a stream is collected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType

from dnd_sdk.engine.text import Generation

Emit = Callable[[str], None]
_Item = str | Generation | BaseException


class TextStream:
    """Iterator over pieces of one completion; joined they are the whole text. Also a context manager."""

    def __init__(self, work: Callable[[Emit, threading.Event], Generation]) -> None:
        self.generation: Generation | None = None
        """The summed-up completion, once the iteration has ended."""
        self._closed = threading.Event()
        self._items: SimpleQueue[_Item] = SimpleQueue()
        self._ended = False
        # not a daemon: a thread killed inside the model aborts the interpreter on exit
        self._thread = threading.Thread(target=_run, args=(work, self._items, self._closed), name="dnd-stream")
        self._thread.start()

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, str):
            return item
        self._ended = True
        if isinstance(item, Generation):
            self.generation = item
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop generating (within a token) and iterating; harmless when the stream has ended."""
        self._closed.set()
        self._ended = True

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._closed.set()


def _run(
    work: Callable[[Emit, threading.Event], Generation], items: SimpleQueue[_Item], closed: threading.Event
) -> None:
    try:
        items.put(work(items.put, closed))
    except BaseException as error:  # the consumer must hear of everything, it waits on the queue
        items.put(error)
