"""Passing requests on to replicas, and what becomes of one whose replica has ended.

Nothing of an answer is sent before its head and the first piece of its body are here. Until then a request that can be
repeated is asked again, once; after that the client is told.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple, Protocol

from starlette.types import Message, Receive, Scope, Send

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.errors import BackendError, BusyError, DndError
from dnd_sdk.integrations.ray.affinity import adapter_of
from dnd_sdk.integrations.ray.exchange import Request
from dnd_sdk.server import Problem, RequestError, event, problem_of

log = logging.getLogger(__name__)

ATTEMPTS = 2
"""A request that ends its replica must not end all of them."""
_REPEATABLE = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/dnd/route")
"""Posted there, a request changes nothing, or adds an adapter that is named by its content."""
_STREAM = b"text/event-stream"


class Answer(Protocol):
    """What a replica is answering: first an empty batch, which says that it has begun, then ASGI messages."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...
    def cancel(self) -> object:
        """End the replica's work on it; harmless when that is over."""


class Faults(NamedTuple):
    """What asking a replica may raise."""

    ended: tuple[type[BaseException], ...]
    """The replica's process or its machine has ended."""
    full: tuple[type[BaseException], ...]
    """Too many requests wait for a replica."""
    failed: tuple[type[BaseException], ...]
    """The replica, or all of them, cannot answer."""


class _CutOff(Exception):
    """The replica's work was cancelled, by nobody here."""


class Forwarding:
    """An ASGI application that has others answer."""

    def __init__(
        self,
        ask: Callable[[str, Request], Answer],
        faults: Faults,
        store: AdapterStore,
        *,
        wait_s: float,
        is_open: bool,
    ) -> None:
        """`ask` hands a request to a replica that has the adapter of that id in memory, if there is one; empty: to any.

        `wait_s` bounds the time until one takes it up. `is_open`: whether other machines may ask.
        """
        self._ask, self._faults, self._store, self._wait_s, self._is_open = ask, faults, store, wait_s, is_open
        self._ended: tuple[type[BaseException], ...] = (*faults.ended, _CutOff)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if not self._is_open and not _is_of_this_machine(scope):
            raise RequestError(Problem(403, "without a key, only this machine is answered", code="key_not_set",
                                       fix="set DND_API_KEY where the application is built"))  # fmt: skip
        request = await Request.of(scope, receive)
        if request is None:
            return
        adapter = await asyncio.to_thread(partial(adapter_of, self._store, scope["path"], request.body))
        is_stream = is_over = False
        try:
            async with aclosing(self._batches(adapter or "", request)) as batches:
                async for batch in batches:
                    is_stream = is_stream or _is_head_of_stream(batch[0])
                    for message in batch:
                        await send(message)
                    is_over = not batch[-1].get("more_body", False)
        except DndError as error:
            if is_over:  # the replica has ended, but after its last word
                return
            if not is_stream:
                raise
            await send({"type": "http.response.body", "body": event(problem_of(error).body), "more_body": False})

    async def _batches(self, adapter: str, request: Request) -> AsyncGenerator[list[Message], None]:
        """Of one attempt after the other, until one has given some."""
        for attempt in range(1, ATTEMPTS + 1):
            has_begun = False
            try:
                async with aclosing(self._told(self._ask(adapter, request))) as batches:
                    async for batch in batches:
                        yield batch if has_begun or attempt == 1 else _marked(batch, attempt)
                        has_begun = True
                return
            except self._ended as e:
                log.warning("a replica has ended while it answered %s", request.head["path"])
                if has_begun or attempt == ATTEMPTS or not _is_repeatable(request):
                    raise _lost(request, has_begun) from e

    async def _told(self, answer: Answer) -> AsyncGenerator[list[Message], None]:
        """What it says after its empty batch; raises our errors, or what says that the replica has ended."""
        batches, is_over = aiter(answer), False
        try:
            async with asyncio.timeout(self._wait_s):
                await anext(batches)
            async for batch in batches:
                yield batch
            is_over = True
        except asyncio.CancelledError as e:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise _CutOff from e  # the replica's task was cancelled, not ours
        except TimeoutError as e:
            raise BusyError(f"no replica took the request within {self._wait_s:g} s", fix="try again later") from e
        except self._faults.full as e:
            raise BusyError("too many requests wait already", fix="try again later") from e
        except self._faults.failed as e:
            log.error("a replica failed", exc_info=e)
            raise BackendError("the replicas cannot answer; their log says why") from e
        finally:
            if not is_over:
                answer.cancel()


def _lost(request: Request, has_begun: bool) -> BackendError:
    if has_begun:
        return BackendError("the replica has ended in the middle of this answer", fix="ask again")
    if _is_repeatable(request):
        return BackendError("one replica after the other has ended while answering this", fix="ask again later")
    return BackendError(
        "the replica has ended, it may or may not have done what was asked", fix="see what is there, then ask again"
    )


def _marked(batch: list[Message], attempt: int) -> list[Message]:
    """Say in the answer's head that it is not of the first attempt."""
    head: dict[str, Any] = {**batch[0], "headers": [*batch[0]["headers"], (b"x-dnd-attempt", b"%d" % attempt)]}
    return [head, *batch[1:]]


def _is_repeatable(request: Request) -> bool:
    return request.head["method"] in ("GET", "HEAD") or request.head["path"] in _REPEATABLE


def _is_head_of_stream(message: Message) -> bool:
    return any(n == b"content-type" and v.startswith(_STREAM) for n, v in message.get("headers", ()))


def _is_of_this_machine(scope: Scope) -> bool:
    client = scope.get("client")
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
