"""Listening, being told to stop, and ending in bounded time."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dnd_sdk.errors import ConfigError
from dnd_sdk.server.app import create_app
from dnd_sdk.server.settings import ServerSettings
from dnd_sdk.session import DnD

log = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 32 * 1024
_KEEP_ALIVE_S = 15
_MAX_CONNECTIONS = 4096
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
        config = uvicorn.Config(
            app,
            http=_Timed,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(settings.shutdown_s)),
            limit_concurrency=_MAX_CONNECTIONS,
            backlog=_BACKLOG,
        )
        server = _Server(config)
        if listening is not None:
            told = Listening(_url(sock), app.state.service.instance, lambda: setattr(server, "should_exit", True))
            server.told = partial(listening, told)
        with _own_sigterm():
            server.run(sockets=[sock])


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


class _Timed(H11Protocol):
    """Hangs up on a connection whose next request's head does not come in whole in time."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        cycle = self.cycle
        super().handle_events()
        if self.cycle is not cycle:  # a request has begun
            self._heard()

    def on_response_complete(self) -> None:
        self._wait_for_head()
        super().on_response_complete()

    def _wait_for_head(self) -> None:
        self._heard()
        self._head = self.loop.call_later(_KEEP_ALIVE_S, self._hang_up)

    def _heard(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _hang_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


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
