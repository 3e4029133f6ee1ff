"""What every request passes before a route sees it: host, origin, key, size and time of its body; then the log.

Plain ASGI, so that nothing is buffered and streams stay streams.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dnd_sdk.server.access_log import log_access
from dnd_sdk.server.problems import Problem, RequestError, problem_of
from dnd_sdk.server.service import Service

log = logging.getLogger(__name__)

_OPEN = ("/health", "/ready", "/", "/favicon.ico")
_OPEN_UNDER = "/page/"
_UPLOADS = ("/dnd/adapt", "/dnd/adapters")


class Guard:
    """Lets through what may be answered; the rest gets an error of OpenAI's form."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service, self._settings = app, service, service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        began, sending = time.monotonic(), _Sending(send, self._settings.body_timeout_s)
        try:
            headers = Headers(scope=scope)
            self._check(scope, headers)
            body = _Body(receive, self._limit(scope, headers), self._settings.body_timeout_s)
            body.check_length(headers)
            await self._app(scope, body, sending)
        except Exception as error:
            await self._fail(scope, receive, sending, error)
        finally:
            self._note(scope, sending.status, time.monotonic() - began)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if not self._settings.is_called(headers.get("host", "")):
            raise RequestError(Problem(403, "this server is not called that", code="host_not_allowed"))
        origin = headers.get("origin")
        if origin is not None and not self._settings.is_called(origin.partition("://")[2] or origin):
            raise RequestError(Problem(403, "pages of other sites may not ask here", code="origin_not_allowed"))
        if not self._settings.keys or scope["path"] in _OPEN or scope["path"].startswith(_OPEN_UNDER):
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        name = self._settings.key_name(key.strip()) if kind.lower() == "bearer" else None
        if name is None:
            told = {"WWW-Authenticate": "Bearer"}
            raise RequestError(
                Problem(401, "a valid API key is needed", code="invalid_api_key", fix="send it as a bearer token",
                        headers=told)
            )  # fmt: skip
        scope.setdefault("dnd", {})["key"] = name

    def _limit(self, scope: Scope, headers: Headers) -> int:
        is_form = headers.get("content-type", "").startswith("multipart/")
        is_upload = is_form and scope["path"] in _UPLOADS
        return self._settings.max_upload_bytes if is_upload else self._settings.max_body_bytes

    async def _fail(self, scope: Scope, receive: Receive, send: _Sending, error: Exception) -> None:
        if send.status is not None:  # an answer has begun: all that is left is to end it early
            log.debug("an answer broke off", exc_info=error)
            raise error
        problem = problem_of(error)
        await answer_of(problem, close=True)(scope, receive, send)

    def _note(self, scope: Scope, status: int | None, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._service.metrics.requests.labels(route, str(status or 499)).inc()
        self._service.metrics.seconds.labels(route).observe(seconds)
        log_access(scope, status or 499, seconds)


def answer_of(problem: Problem, *, close: bool = False) -> JSONResponse:
    """The answer that tells a problem; `close`: the connection ends with it, since a body may still be coming."""
    headers: Mapping[str, str] = {**problem.headers, **({"Connection": "close"} if close else {})}
    return JSONResponse(problem.body, problem.status, headers)


class _Body:
    """A request's body, up to a size and within a time."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self._deadline = time.monotonic() + timeout_s
        self._n = 0
        self._whole = False

    def check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._max_bytes:
            raise self._too_large()

    async def __call__(self) -> Message:
        if self._whole:  # what comes now is the client's leaving, which may take as long as it likes
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError as e:
            raise RequestError(Problem(408, "the request took too long to come in", code="timeout")) from e
        if message["type"] == "http.request":
            self._n += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._n > self._max_bytes:
                raise self._too_large()
        return message

    def _too_large(self) -> RequestError:
        return RequestError(Problem(413, f"the request is larger than {self._max_bytes} bytes", code="too_large"))


class _Sending:
    """Sends an answer, and lets go of a client that takes nothing for too long."""

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send, self._timeout_s = send, timeout_s
        self.status: int | None = None
        """None: no answer has begun."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: list[Any] = list(message.get("headers", []))
            message = {**message, "headers": [*headers, (b"x-content-type-options", b"nosniff")]}
        async with asyncio.timeout(self._timeout_s):
            await self._send(message)
