"""One HTTP request between two processes: its head and body in one piece, its answer as ASGI messages in batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope

_CARRIED = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client")


@dataclass(frozen=True)
class Request:
    """A request that has come in whole."""

    head: dict[str, Any]
    """Of its ASGI scope what is plain data."""
    body: bytes

    @classmethod
    async def of(cls, scope: Scope, receive: Receive) -> Request | None:
        """Read it; None: the client has left. Whoever bounds its size has wrapped `receive`."""
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return cls({name: scope[name] for name in _CARRIED if name in scope}, b"".join(parts))


async def answered(app: ASGIApp, request: Request) -> AsyncGenerator[list[Message], None]:
    """Run an application on a request: its messages in batches, as they come, the head never alone.

    Closing ends the application's work, as a client's leaving does. Raises what the application raises.
    """
    news: asyncio.Queue[Message | None] = asyncio.Queue()
    body = iter([{"type": "http.request", "body": request.body, "more_body": False}])

    async def receive() -> Message:
        if (message := next(body, None)) is not None:
            return message
        await asyncio.Future()  # the client's leaving, which comes as the end of the task
        raise AssertionError

    async def send(message: Message) -> None:
        news.put_nowait(message)

    work = asyncio.create_task(_run(app, {"type": "http", **request.head}, receive, send, news))
    try:
        while batch := await _batch(news):
            yield batch
        await work
    finally:
        work.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await work


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Any, news: asyncio.Queue[Message | None]) -> None:
    try:
        await app(scope, receive, send)
    finally:
        news.put_nowait(None)


async def _batch(news: asyncio.Queue[Message | None]) -> list[Message]:
    """What there is, at least one message and one of the body; empty: it is over."""
    batch: list[Message] = []
    while not batch or batch[-1]["type"] == "http.response.start" or not news.empty():
        message = await news.get()
        if message is None:
            if batch:
                news.put_nowait(None)
            break
        batch.append(message)
    return batch
