"""Listening, being told to stop, and ending in bounded time."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from types import FrameType
from typing import NamedTuple

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dnd_sdk.errors import ConfigError
from dnd_sdk.server.app import create_app
from dnd_sdk.server.problems import Problem
from dnd_sdk.server.settings import ServerSettings
from dnd_sdk.session import DnD

log = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 32 * 1024
_KEEP_ALIVE_S = 15
_MAX_CONNECTIONS = 4096
_OTHER_FILES = 256
"""Files that are left to the rest of the process, where the system allows fewer than there may be connections."""
_BACKLOG = 1024


class Listening(NamedTuple):
    """A server that answers."""

    url: str
    instance: str
    """Which run of a server it is, as `/health` tells it."""
    stop: Callable[[], None]
    """As SIGTERM does, from any thread: no further request is taken, those that run have `shutdown_s` to end."""


def serve(
    load: Callable[[], DnD], settings: ServerSettings, *, listening: Callable[[Listening], None] | None = None
) -> None:
    """Load a session and answer until SIGTERM or Ctrl-C.

    The address is taken before the session is loaded and answers after; `listening` is then told, before the first
    request. Raises `ConfigError` when the address cannot be had.
    """
    with _bound(settings) as sock, load() as dnd:
        app = create_app(dnd, settings)
        app.state.max_connections = _max_connections()
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level=logging.ERROR,  # not of each that sends what is no HTTP
            server_header=False,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(settings.shutdown_s)),
            backlog=_BACKLOG,
        )
        server = _Server(config)
        if listening is not None:
            told = Listening(_url(sock), app.state.service.instance, lambda: setattr(server, "should_exit", True))
            server.told = partial(listening, told)
        with _own_sigterm():
            server.run(sockets=[sock])


def _max_connections() -> int:
    """How many may be open; the process is allowed as many files as its system lets it ask for."""
    try:
        import resource
    except ImportError:  # not a Unix
        return _MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(_MAX_CONNECTIONS, max(1, soft - _OTHER_FILES))


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is the server's to obey: it raises the signal again once it has ended, which would kill us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """Says when it listens, and that it is stopping."""

    told: Callable[[], None] = staticmethod(lambda: None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if not self.should_exit:
            self.told()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.service.stopping = True  # type: ignore[union-attr]
        await super().shutdown(sockets=sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._captured_signals:  # asked again: what runs may hang
            os._exit(128 + sig)
        super().handle_exit(sig, frame)


class _Connection(H11Protocol):
    """Hangs up on a client that does not send its request's head in time, or takes nothing of what it is sent."""

    _head: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.config.app.state.max_connections:  # type: ignore[union-attr]
            self._refuse(Problem(503, "too many connections are open", "server_error", None, "busy"))
        self._wait_for_head()
        self._check_taking()

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        if self._taking is not None:
            self._taking.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        cycle = self.cycle
        super().handle_events()
        if self.cycle is not cycle:  # a request has begun
            self._heard()

    def on_response_complete(self) -> None:
        self._wait_for_head()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        if not answered:  # by its body; to the application the client has gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if answered or not self.cycle.response_started:
            self._refuse(Problem(400, "this is no HTTP request, or its head is too long", code="bad_request"))
        self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application, and hang up."""
        body = json.dumps(problem.body).encode()
        head = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _wait_for_head(self) -> None:
        self._heard()
        self._head = self.loop.call_later(_KEEP_ALIVE_S, self.transport.close)

    def _heard(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _check_taking(self) -> None:
        """Now and then, also once the answer is complete or the connection is being closed."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent == self._unsent:
            self.transport.abort()  # closing would wait until it is taken
            return
        self._unsent = unsent
        service = self.config.app.state.service  # type: ignore[union-attr]
        self._taking = self.loop.call_later(service.settings.body_timeout_s, self._check_taking)


def _bound(settings: ServerSettings) -> socket.socket:
    """A socket that has the address and does not listen yet: whoever calls too early is refused and does not hang."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((settings.host, settings.port))
    except OSError as e:
        sock.close()
        raise ConfigError(
            f"cannot listen on {settings.host}, port {settings.port}: {e.strerror or e}",
            fix="choose another --port (0: any that is free), or stop what listens there",
        ) from e
    sock.set_inheritable(True)
    return sock


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
