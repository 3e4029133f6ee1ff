"""What every request passes before a route sees it: host, origin, key, size and time of its body; then the log.

Plain ASGI, so that nothing is buffered and streams stay streams.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dnd_sdk.errors import BusyError
from dnd_sdk.server.problems import Problem, RequestError, problem_of
from dnd_sdk.server.settings import ServerSettings

log = logging.getLogger(__name__)

_OPEN = ("/health", "/ready", "/", "/favicon.ico")
_OPEN_UNDER = "/page/"
_LINGER_S, _LINGER_BYTES = 2.0, 32 * 2**20
"""For how long, and how much of, a body is read on that is too large or too late."""
_HELD_UPLOADS = 2
"""As many bytes as this many uploads may have are held at most, of all requests together."""
_CLOSE = (b"connection", b"close")
_NOSNIFF = (b"x-content-type-options", b"nosniff")
_UPLOADS = ("/dnd/adapt", "/dnd/adapters")


class Guard:
    """Lets through what may be answered; the rest gets an error of OpenAI's form."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        *,
        note: Callable[[Scope, int, float], None],
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`note` is told of each request's end: its status and the seconds it took.

        `is_stopping`: whether what is cancelled now is cut for the server's own end.
        """
        self._app, self._settings, self._note, self._is_stopping = app, settings, note, is_stopping
        self._held = _Held(_HELD_UPLOADS * self._settings.max_upload_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        began, headers = time.monotonic(), Headers(scope=scope)
        body = _Body(receive, headers, self._limit(scope, headers), self._settings.body_timeout_s, self._held)
        sending = _Sending(send, body)
        try:
            self._check(scope, headers)
            body.check_length()
            await self._app(scope, body, sending)
        except Exception as error:
            await self._fail(scope, receive, sending, error)
        except asyncio.CancelledError:
            if not self._is_stopping():
                raise
            log.warning("an answer was cut: the server's time to stop was over")
        finally:
            body.let_go()
            self._note(scope, sending.status or 499, time.monotonic() - began)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if not self._settings.is_called(headers.get("host", "")):
            raise RequestError(Problem(403, "this server is not called that", code="host_not_allowed"))
        origin = headers.get("origin")
        if origin is not None and not self._settings.is_called(origin.partition("://")[2] or origin):
            raise RequestError(Problem(403, "pages of other sites may not ask here", code="origin_not_allowed"))
        if not self._settings.keys or is_open(scope["path"]):
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
        await answer_of(problem)(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether no key is asked for there."""
    return path in _OPEN or path.startswith(_OPEN_UNDER)


def answer_of(problem: Problem) -> JSONResponse:
    """The answer that tells a problem."""
    return JSONResponse(problem.body, problem.status, problem.headers)


class _Held:
    """Bytes of all bodies whose requests are being read or answered."""

    def __init__(self, max_bytes: int) -> None:
        self.n_bytes, self.max_bytes = 0, max_bytes


class _Body:
    """A request's body, up to a size and within a time."""

    def __init__(self, receive: Receive, headers: Headers, max_bytes: int, timeout_s: float, held: _Held) -> None:
        self._receive, self._max_bytes, self._held = receive, max_bytes, held
        self._length, self._is_chunked = headers.get("content-length", "0"), "transfer-encoding" in headers
        self._deadline = time.monotonic() + timeout_s
        self._n = 0
        self.is_whole = self._length == "0" and not self._is_chunked
        """Whether all of it has come."""

    def check_length(self) -> None:
        """Raise `RequestError` for one that says itself that it is too large, or says two things."""
        if self._is_chunked and self._length != "0":  # whoever stands in front may have read the other
            raise RequestError(Problem(400, "content-length and transfer-encoding exclude each other"))
        if not self._length.isdecimal() or int(self._length[:20]) > self._max_bytes:
            raise self._too_large()

    def let_go(self) -> None:
        """Its request is over."""
        self._held.n_bytes -= self._n
        self._n = 0

    async def __call__(self) -> Message:
        if self.is_whole:  # what comes now is the client's leaving, which may take as long as it likes
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError as e:
            raise RequestError(Problem(408, "the request took too long to come in", code="timeout")) from e
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            self.is_whole = not message.get("more_body", False)
        return message

    async def pass_over(self) -> None:
        """Read on for a moment, for nobody."""
        n = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not self.is_whole and n < _LINGER_BYTES:
                    message = await self._receive()
                    n += len(message.get("body", b""))
                    self.is_whole = not message.get("more_body", False)

    def _count(self, n: int) -> None:
        self._n += n
        self._held.n_bytes += n
        if self._n > self._max_bytes:
            raise self._too_large()
        if self._held.n_bytes > self._held.max_bytes:
            full = BusyError("the server holds all it can of other requests", fix="try again later")
            raise RequestError(problem_of(full))

    def _too_large(self) -> RequestError:
        return RequestError(Problem(413, f"the request is larger than {self._max_bytes} bytes", code="too_large"))


class _Sending:
    """Sends an answer; a connection on which a body is still coming ends with it."""

    def __init__(self, send: Send, body: _Body) -> None:
        self._send, self._body = send, body
        self.status: int | None = None
        """None: no answer has begun."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: list[Any] = [*message.get("headers", [])]
            if _NOSNIFF not in headers:  # of an answer that passed another guard
                headers.append(_NOSNIFF)
            message = {**message, "headers": headers if self._body.is_whole else [*headers, _CLOSE]}
        elif not self._body.is_whole and not message.get("more_body", False):
            # a connection that is closed while more comes in is reset, and the client may never read the answer
            await self._send({**message, "more_body": True})
            await self._body.pass_over()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)
