"""A streamed completion: pieces of text while it is made, the whole `Completion` afterwards."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING

from dnd_sdk.session.results import Completion, completion

if TYPE_CHECKING:
    from dnd_sdk.adapters import Adapter
    from dnd_sdk.engine import TextStream


class CompletionStream:
    """Iterator over pieces of text; also a context manager that closes it."""

    def __init__(self, pieces: TextStream, cancel: threading.Event, adapter: Adapter | None) -> None:
        self._pieces, self._cancel, self._adapter = pieces, cancel, adapter

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
        return completion(self._pieces.generation, self._adapter)

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
