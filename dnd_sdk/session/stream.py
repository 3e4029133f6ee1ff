"""A completion on its way: pieces of text while it is made, the whole `Completion` afterwards."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING

from dnd_sdk.session.results import Chosen, Completion, completion

if TYPE_CHECKING:
    from concurrent.futures import Future

    from dnd_sdk.engine import Generation, TextStream


class CompletionStream:
    """Iterator over pieces of text; also a context manager that closes it."""

    def __init__(self, pieces: TextStream, cancel: threading.Event, chosen: Chosen) -> None:
        self._pieces, self._cancel, self._chosen = pieces, cancel, chosen

    def __iter__(self) -> CompletionStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> Completion:
        """The whole answer; reads the rest of it first. Raises `RuntimeError` after `close`."""
        for _ in self._pieces:
            pass
        if self._pieces.generation is None:
            raise RuntimeError("the stream was closed before its end, there is no result")
        return completion(self._pieces.generation, self._chosen)

    def cancel(self) -> None:
        """End the answer within a token; `result` is then what was said so far."""
        self._cancel.set()

    def close(self) -> None:
        """End the answer and forget it; harmless at the end."""
        self._pieces.close()

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Submitted:
    """A request that was handed in."""

    def __init__(self, future: Future[Generation], chosen: Chosen) -> None:
        self.future, self.chosen = future, chosen
        """Cancelling the future ends the work within a token; see `completion` for what it comes to."""

    def completion(self, timeout_s: float | None = None) -> Completion:
        """The whole answer; waits for it, `timeout_s` None for as long as it takes.

        Raises what went wrong, `TimeoutError` or, after a cancel, `concurrent.futures.CancelledError`.
        """
        return completion(self.future.result(timeout_s), self.chosen)
