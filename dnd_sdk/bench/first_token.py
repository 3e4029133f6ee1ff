"""How long a short streamed prompt waits for its first word: alone, beside a long prompt, and under decoding rows."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dnd_sdk.bench.timing import ratio
from dnd_sdk.bench.workload import N_ADAPTERS, Workload
from dnd_sdk.engine import TextStream

_WARM_UPS = 1
_BEGUN = 0.1
"""Share of the long prompt's own time after which the short one is asked: it has been begun, most is still to do."""
_LONG_ANSWER = 256
"""Tokens that decoding rows would make; they are cancelled as soon as the short prompt has its word."""


def time_first_token(work: Workload) -> dict[str, Any]:
    """Milliseconds until the first piece of a stream: idle, while another thread's prompt is read, under eight rows."""
    reader, rows = _Reader(work), _Rows(work)
    seconds: dict[str, list[float]] = {"idle": [], "long": [], "beside_long": [], "under_rows": []}
    reader.read()  # the first is a cold one, and how long it takes decides when the short prompt is asked
    for turn in range(_WARM_UPS + work.sizes.rounds):
        took = {"idle": _first(work), "long": reader.read()}
        with reader.reading():
            took["beside_long"] = _first(work)
        with rows.decoding():
            took["under_rows"] = _first(work)
        if turn >= _WARM_UPS:
            for name, s in took.items():
                seconds[name].append(s)
    return {
        "long_tokens": work.sizes.long_tokens,
        "rows": N_ADAPTERS,
        "rows_were_decoding": min(rows.running),
        **{f"{name}_ms": 1e3 * statistics.median(s) for name, s in seconds.items()},
        "beside_long_over_idle": ratio(seconds["beside_long"], seconds["idle"]),
        "beside_long_over_long": ratio(seconds["beside_long"], seconds["long"]),
        "under_rows_over_idle": ratio(seconds["under_rows"], seconds["idle"]),
    }


def _first(work: Workload) -> float:
    """Seconds until a new short prompt has its first piece; the stream is over when this returns."""
    request = work.request(work.story(), work.adapters[0], 1)
    start = work.clock()
    stream = work.engine.stream(request)
    next(stream, None)  # None where the only token is no whole character
    took = work.clock() - start
    for _ in stream:
        pass
    return took


class _Reader:
    """Has long prompts read, each a new one."""

    def __init__(self, work: Workload) -> None:
        self._work, self._seconds = work, 0.0

    def read(self) -> float:
        """How long it takes alone."""
        self._seconds = self._read(self._prompt())
        return self._seconds

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, a thread has begun to have one read; it is over after it, and what went wrong there is raised."""
        errors: list[BaseException] = []
        prompt = self._prompt()

        def work() -> None:
            try:
                self._read(prompt)
            except BaseException as e:  # else an idle engine would be measured
                errors.append(e)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            time.sleep(_BEGUN * self._seconds)
            yield
        finally:
            thread.join()
        if errors:
            raise errors[0]

    def _prompt(self) -> str:
        return self._work.head(self._work.sizes.long_tokens)

    def _read(self, prompt: str) -> float:
        start = self._work.clock()
        self._work.answer([self._work.request(prompt, self._work.adapters[1], 1)])
        return self._work.clock() - start


class _Rows:
    """Has one long answer of each adapter written."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._n_tokens = min(_LONG_ANSWER, work.engine.context_tokens // 2)
        self.running: list[int] = []
        """How many rows were not at their end when the block was, each time."""

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside, every row has its first word and goes on; they are over after it."""
        work, over = self._work, threading.Event()
        requests = [work.request(work.story(), a, self._n_tokens, cancel=over) for a in work.adapters]
        streams: list[TextStream] = []
        try:
            streams.extend(work.engine.stream(request) for request in requests)
            for stream in streams:
                next(stream, None)
            yield
        finally:
            over.set()
            for stream in streams:
                for _ in stream:
                    pass
        self.running.append(
            sum(s.generation is not None and s.generation.finish_reason == "cancelled" for s in streams)
        )
