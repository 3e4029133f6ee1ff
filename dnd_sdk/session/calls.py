"""One call of a framework's model: worked on in one thread, and ended from any other.

Asynchronous calls work in threads of their own: the event loop's default ones are few and belong to everybody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Generic, NamedTuple, TypeVar

from dnd_sdk.adapters import Adapter
from dnd_sdk.chat import ToolCall, Tools, plain_so_far, read_answer
from dnd_sdk.errors import InputError, shown
from dnd_sdk.prompts import user_text
from dnd_sdk.session.choosing import AUTO, AdapterChoice
from dnd_sdk.session.results import Completion
from dnd_sdk.session.session import DnD
from dnd_sdk.session.stream import CompletionStream

log = logging.getLogger(__name__)

MAX_THREADS = 32
"""Asynchronous calls at work at a time; more of them wait in line."""

T = TypeVar("T")

_threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="dnd-call")


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

    def __init__(
        self,
        start: Callable[[threading.Event], CompletionStream],
        *,
        tools: Tools = (),
        parallel: bool = True,
        held: bool = False,
        end: threading.Event | None = None,
    ) -> None:
        """`start` chooses the adapter and starts the engine, which must stop within a token of the event.

        `tools` are those on offer: their calls leave the text and go beside it, only the first unless `parallel`.
        `held`: the answer is to be whole JSON; `InputError` where `max_new_tokens` cut it.
        `end` is that event; None: one of its own.
        """
        self._start, self._tools, self._parallel, self._held = start, tools, parallel, held
        self._end = end or threading.Event()

    def answer(self) -> Part:
        """The whole answer."""
        with self._start(self._end) as stream:
            return self._whole(stream.result)

    def parts(self) -> Iterator[Part]:
        """The answer piece by piece, then once more whole with its usage and calls.

        Where tools are on offer, what may yet turn out to be a call is held back.
        """
        text = shown = ""
        with self._start(self._end) as stream:
            for delta in stream:
                text += delta
                plain = plain_so_far(text) if self._tools else text
                if len(plain) > len(shown):
                    yield Part(plain, plain[len(shown) :])
                    shown = plain
            whole = self._whole(stream.result)
            if len(whole.text) > len(shown):
                yield Part(whole.text, whole.text[len(shown) :])
            yield whole

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

    def _whole(self, completion: Completion) -> Part:
        if self._held:
            check_whole(completion.text, completion.finish_reason, completion.usage["completion_tokens"])
        if not self._tools:
            return Part(completion.text, "", completion)
        text, calls = read_answer(completion.text, self._tools)
        return Part(text, "", completion, calls if self._parallel else calls[:1])


class Lazy(Generic[T]):
    """A value made on first use, once, whichever threads ask; copies of what holds it share it."""

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Lazy[T]:
        return self


def who_answers(
    dnd: DnD, chat: Sequence[Mapping[str, Any]], adapter: AdapterChoice, tools: Tools, *, observe: bool
) -> AdapterChoice:
    """The adapter of a call as `DnD.stream` takes it; `observe`: one that is `"auto"` also teaches the tasks.

    Then an adapter may be made here, in the thread that answers this request alone.
    """
    if isinstance(adapter, Adapter) or adapter != AUTO:
        return adapter
    text = user_text(chat) or ""
    if not text.strip():  # nothing to route by
        return None
    # a tool's result is no request, and with tools on offer no adapter answers
    return _observed(dnd, text) if observe and not tools and chat[-1]["role"] != "tool" else AUTO


def _observed(dnd: DnD, text: str) -> Adapter | None:
    try:
        adapter = dnd.observe(text).adapter
        if adapter is not None:
            dnd.make_resident(adapter)
    except Exception as error:  # whatever goes wrong with adapting, the request is to be answered
        log.warning("adapting failed, the base answers: %s", error, exc_info=True)
        return None
    return adapter


def check_whole(text: str, finish_reason: str | None, n_tokens: int) -> None:
    """Raise `InputError` for an answer held to a schema that `max_new_tokens` cut before it was whole JSON."""
    if finish_reason == "length" and not _is_json(text):
        raise InputError(
            f"max_new_tokens={n_tokens} cut the answer before it fits its schema: {shown(text)}",
            fix="raise max_new_tokens, or ask for less: bound the schema's strings and lists",
        )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run `work` in one of our threads, in the caller's context."""
    return asyncio.get_running_loop().run_in_executor(_threads, copy_context().run, work)
