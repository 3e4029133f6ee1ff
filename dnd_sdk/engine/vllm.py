"""`VllmBackend`: a base that a vLLM server runs, with adapters that it reads from a folder both see.

* One event loop waits for all requests; each is streamed, so that a cancel or a deadline keeps what was said, and ends
  by hanging up.
* An adapter is loaded under a name that says its content, so no request can meet another's weights under it.
* A server that was started anew has forgotten its adapters: a request that finds its own gone loads it and tries again.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnd_sdk.adapters import served_folder
from dnd_sdk.chat import tools_not_shown
from dnd_sdk.config import whole_number
from dnd_sdk.engine.backend import Backend
from dnd_sdk.engine.event_loop import EventLoop
from dnd_sdk.engine.stream import Emit, Ended, TextFeed, TextStream, resolving
from dnd_sdk.engine.text import Generation
from dnd_sdk.engine.vllm_adapters import LoadedAdapters, Prepare
from dnd_sdk.engine.vllm_http import ModelNotServedError, Wire
from dnd_sdk.engine.vllm_server import base_card, n_tokens, read_base, token_ids
from dnd_sdk.engine.vllm_wire import AnswerSoFar, Work, body_of
from dnd_sdk.errors import AdapterNotFoundError, BackendError, ContextLengthError

if TYPE_CHECKING:
    from torch import Tensor

    from dnd_sdk.adapters import Adapter
    from dnd_sdk.engine.request import CompletionRequest
    from dnd_sdk.lora import LoraLayout

MAX_LOADED = 64
"""Adapters that are loaded at a time unless the caller says otherwise; vLLM keeps its own order among them."""
POLL_S, WATCH_S, MISSES = 0.05, 5.0, 3
"""Between looks whether a request is still wanted, and at a server that says nothing; so many in vain and it hangs."""

_TEMPLATE = 512
"""Tokens that a chat template may add of its own."""

Find = Callable[[str], "Adapter"]
"""Brings a stored adapter by its id; raises `AdapterNotFoundError` for one it does not know."""


class VllmBackend(Backend):
    """One vLLM server; every method may be called from any thread but those of `emit` and of futures' callbacks."""

    local = None

    def __init__(
        self,
        url: str,
        layout: LoraLayout,
        served: Path,
        *,
        key: str | None = None,
        seen_at: str | None = None,
        find: Find | None = None,
        max_loaded: int = MAX_LOADED,
        fix: str | None = None,
    ) -> None:
        """Ask the server what it is.

        Args:
            url: `http://HOST:PORT`, with or without `/v1`, or `unix:/PATH` of its `--uds`.
            layout: Of its base's adapters.
            served: The folder in which adapters are put for it; made when the first one is.
            key: What it asks of whoever calls (its `--api-key`); None: nothing.
            seen_at: Where it sees `served`; None: at the same path.
            find: For adapters that a request names while they are not loaded (any more); None: that is an error.
            max_loaded: Adapters that are loaded at a time; the least recently used one gives way.
            fix: What helps when the server fails or is gone, as errors are to say; None: what helps with most.

        Raises `BackendError` for a server that cannot be reached, is no vLLM or refuses the key; `ConfigError`.
        """
        most = whole_number("max_loaded", max_loaded, 1)
        self._layout, self.served, self._find = layout, served, find
        self._wire, self._loop = Wire(url, key, fix), EventLoop("dnd-vllm")
        self._adapters = LoadedAdapters(self._wire, most, served, seen_at)
        self._answers: set[AnswerSoFar] = set()
        self.served_base = self._loop.run(read_base(self._wire))

    @property
    def url(self) -> str:
        """Of the server."""
        return self._wire.url

    @property
    def layout(self) -> LoraLayout:
        """As given."""
        return self._layout

    @property
    def context_tokens(self) -> int:
        """The server's `--max-model-len`."""
        return self.served_base.context_tokens

    @property
    def shows_tools(self) -> bool:
        """See `ServedBase.shows_tools`."""
        return self.served_base.shows_tools

    @property
    def has_chat_template(self) -> bool:
        """See `ServedBase.has_chat_template`; without one requests fail, with the server's reason."""
        return self.served_base.has_chat_template

    @property
    def n_running(self) -> int:
        """Of this process's requests, those that the server has begun to answer."""
        return sum(a.began for a in list(self._answers))

    @property
    def n_waiting(self) -> int:
        """Of this process's requests, the others."""
        return sum(not a.began for a in list(self._answers))

    def token_ids(self, text: str) -> list[int] | None:
        """The base's tokens of a text, without special ones; None: the server does not tell. Raises `BackendError`."""
        return self._loop.run(token_ids(self._wire, self.served_base.name, text))

    def resident(self) -> list[str]:
        """Ids of the adapters that the server has from us, least recently used first."""
        return self._adapters.ids()

    def hold(self, adapter: Adapter, load: Callable[[], Tensor]) -> None:
        """Have the server load the adapter, once; see `LoadedAdapters.ensure` for what is raised.

        Others may take its place later, or all may be in use now: a request that names it then needs `find`, without
        which this waits for a place.
        """

        def prepare() -> Path:
            load()  # checks the weights: what is damaged is refused here, by name
            return served_folder(adapter, self.served)

        self._loop.run(self._hold(adapter.id, prepare))

    def pin(self, adapter_id: str, pinned: bool) -> None:
        """See `Backend.pin`."""
        self._loop.run(self._pin(adapter_id, pinned))

    def forget(self, adapter_id: str) -> None:
        """Unload it, if it is loaded; raises `BankFullError` while a request uses it."""
        self._loop.run(self._adapters.forget(adapter_id))

    def close(self) -> None:
        """Unload every adapter that no request uses."""
        self._loop.run(self._adapters.forget_idle())

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Generation]:
        """See `Backend.complete`; what only the server can tell of a request is raised when it does."""
        bodies = [self._checked(r) for r in requests]
        futures = [Future[Generation]() for _ in requests]
        for request, body, future in zip(requests, bodies, futures, strict=True):
            self._start(request, body, future)
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            # the first that failed, if one has; else all are done
            for future in futures:
                if future.done():
                    future.result()
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def submit(self, request: CompletionRequest, emit: Emit | None = None) -> Future[Generation]:
        """See `Backend.submit`; whatever only the server can tell of a request, the future does."""
        future = Future[Generation]()
        self._start(request, self._checked(request), future, emit)
        return future

    def stream(self, request: CompletionRequest) -> TextStream:
        """See `Backend.stream`; returns once the server has taken the request up."""
        body, feed, taken = self._checked(request), TextFeed(), Future[None]()
        self._run(request, body, feed.end, feed.emit, feed.closed, taken)
        taken.result()
        return TextStream(feed)

    def _checked(self, request: CompletionRequest) -> dict[str, Any]:
        """What the server is asked, as far as it can be told beforehand that it is sound."""
        body = body_of(request)
        if not self.shows_tools and ("tools" in body or any("tool_calls" in m for m in body["messages"])):
            raise tools_not_shown()
        if not request.may_clip:
            self._check_room(body, request.options.max_new_tokens)
        return body

    def _check_room(self, body: dict[str, Any], n_new: int) -> None:
        """Raise `ContextLengthError` for a prompt that leaves no room for so many tokens: vLLM would give fewer."""
        chat: dict[str, Any] = {name: body[name] for name in ("messages", "tools") if name in body}
        # a token is a byte at least; only where so many could be too many they are counted, which asks the server
        n_bytes = len(json.dumps(chat, ensure_ascii=False).encode(errors="replace"))
        if n_bytes + _TEMPLATE + n_new <= self.context_tokens:
            return
        n_prompt = self._loop.run(n_tokens(self._wire, {"model": self.served_base.name, **chat}))
        if n_prompt is not None and n_prompt + n_new > self.context_tokens:
            raise ContextLengthError(
                f"the prompt has {n_prompt} tokens, at most {max(self.context_tokens - n_new, 0)} fit into the base's "
                f"context of {self.context_tokens} with max_new_tokens={n_new}",
                fix="shorten the prompt or lower max_new_tokens",
            )

    def _start(
        self, request: CompletionRequest, body: dict[str, Any], future: Future[Generation], emit: Emit | None = None
    ) -> None:
        unwanted = threading.Event()
        future.add_done_callback(lambda done: unwanted.set() if done.cancelled() else None)
        self._run(request, body, resolving(future), emit, unwanted)

    def _run(
        self,
        request: CompletionRequest,
        body: dict[str, Any],
        ended: Ended,
        emit: Emit | None,
        closed: threading.Event,
        taken: Future[None] | None = None,
    ) -> None:
        """Begin to answer; `taken` is done when the server has the request, or with what is wrong with it."""
        work = Work(request, body, closed, taken or Future[None](), AnswerSoFar(emit))

        async def run() -> None:
            self._answers.add(work.answer)
            try:
                outcome: Generation | BaseException = await self._answer(work)
            except BaseException as error:  # the consumer must hear of everything, it waits
                outcome = error
            finally:
                self._answers.discard(work.answer)
            work.take_up(None if isinstance(outcome, Generation) else outcome)
            ended(outcome)

        self._loop.start(run())

    async def _answer(self, work: Work) -> Generation:
        """The answer, or what there is of it once nobody wants the rest."""
        if work.is_over:
            return work.answer.result(work.request, cancelled=True)
        asking = asyncio.create_task(self._ask(work))
        try:
            await self._watch(asking, work)
        finally:
            asking.cancel()
        if work.is_over and not _is_whole(asking):
            await asyncio.wait({asking})  # hangs up
            return work.answer.result(work.request, cancelled=True)
        return await asking

    async def _watch(self, asking: asyncio.Task[Generation], work: Work) -> None:
        """Return at the end or when nobody wants the rest; raises `BackendError` for a server that hangs."""
        looked, misses = time.monotonic(), 0
        while not asking.done() and not work.is_over:
            await asyncio.wait({asking}, timeout=POLL_S)
            if time.monotonic() - max(looked, work.answer.heard) < WATCH_S:
                continue
            misses = 0 if await self._wire.is_alive() else misses + 1
            looked = time.monotonic()
            if misses >= MISSES:
                raise BackendError(f"vLLM at {self.url} hangs: it does not even say that it is well")

    async def _ask(self, work: Work) -> Generation:
        try:
            return await self._ask_loaded(work)
        except ContextLengthError:
            if not work.request.may_clip:
                raise
        # without a limit of ours, the server's own is what the context leaves, which is less
        del work.body["max_tokens"]
        return await self._ask_loaded(work)

    async def _ask_loaded(self, work: Work) -> Generation:
        adapter_id = work.request.adapter_id
        if adapter_id is None:
            return await self._ask_base(work)
        prepare = partial(self._folder, adapter_id)
        async with self._adapters.leased(adapter_id, prepare) as entry:
            try:
                return await self._ask_as(entry.name, work)
            except ModelNotServedError:
                self._adapters.lost(entry)
        await self._check_base()
        async with self._adapters.leased(adapter_id, prepare) as entry:
            return await self._ask_as(entry.name, work)

    async def _ask_base(self, work: Work) -> Generation:
        try:
            return await self._ask_as(self.served_base.name, work)
        except ModelNotServedError as e:
            await self._check_base()
            raise BackendError(e.message, fix="load the session again") from e

    async def _ask_as(self, model: str, work: Work) -> Generation:
        async with self._wire.events("/v1/chat/completions", {"model": model, **work.body}) as chunks:
            work.take_up()
            async for chunk in chunks:
                if work.is_over:
                    return work.answer.result(work.request, cancelled=True)
                work.answer.take(chunk)
        return work.answer.result(work.request)

    async def _check_base(self) -> None:
        """Raise `BackendError` if the server was started anew with another base."""
        card, ours = await base_card(self._wire), self.served_base
        if (card["id"], card.get("root") or card["id"]) != (ours.name, ours.root):
            raise BackendError(
                f"vLLM at {self.url} now serves {card['id']}, it was {ours.name}", fix="load the session again"
            )

    async def _hold(self, adapter_id: str, prepare: Prepare) -> None:
        if self._find is None or self._adapters.may_load(adapter_id):
            await self._adapters.ensure(adapter_id, prepare)
        else:  # who asks for it waits
            await asyncio.to_thread(prepare)

    async def _pin(self, adapter_id: str, pinned: bool) -> None:
        self._adapters.pin(adapter_id, pinned)

    def _folder(self, adapter_id: str) -> Path:
        """What the server is to load of an adapter that is not held."""
        if self._find is None:
            raise AdapterNotFoundError(f"adapter {adapter_id!r} is not held", fix="hold it (again)")
        return served_folder(self._find(adapter_id), self.served)


def _is_whole(asking: asyncio.Task[Generation]) -> bool:
    return asking.done() and not asking.cancelled()
