"""One request to a server under way: it waits as long as the server lives, and not one that is dead or hangs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from types import TracebackType
from typing import Any

from dnd_sdk.client.http import Body, connect, object_of, read_events, read_object
from dnd_sdk.client.presence import Presence
from dnd_sdk.client.refusals import refusal
from dnd_sdk.errors import DndError, ServerError

CONNECT_TIMEOUT_S = 3.0
WATCH_S = 5.0
"""Between looks at a server that says nothing."""
MISSES = 3
"""After so many looks in vain it counts as hanging."""
_FIX = "its log tells why; --no-server works without one"


class Call:
    """A request whose answer is read as it comes; a context manager that hangs up, which ends the server's work."""

    def __init__(
        self, server: Presence, method: str, path: str, body: Body | None = None, *, accept: str = "*/*"
    ) -> None:
        """Send it; raises `ServerError` for a server that cannot be reached, our other errors for what it refuses."""
        self._server = server
        with self._told():
            self._connection = connect(server.url, CONNECT_TIMEOUT_S)
        self._watch = _Watch(server, self._connection)
        try:
            with self._told():
                self._connection.request(method, path, body and body.raw, _headers(server, body, accept))
                self._response: HTTPResponse = self._connection.getresponse()
            if self._response.status >= 400:
                raise refusal(self._response.status, self._error_body())
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Of the server."""
        return self._server.url

    def object(self) -> dict[str, Any]:
        """The JSON object it is answered; raises `ServerError`."""
        with self._told():
            return read_object(self._response)

    def events(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Names and objects of the events it is answered; None for the mark of the end.

        Raises `ServerError` when the server ends meanwhile, our other errors for those it tells in place of an answer.
        """
        with self._told():
            for name, data in read_events(self._response):
                value = None if data == "[DONE]" else object_of(data)
                if value is not None and "error" in value:
                    raise refusal(self._response.status, value)
                yield name, value

    def close(self) -> None:
        """Hang up; harmless at the end."""
        self._watch.stop()
        self._connection.close()

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _error_body(self) -> dict[str, Any]:
        try:
            return read_object(self._response)
        except (OSError, HTTPException):
            return {}

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except DndError:
            raise
        except (OSError, HTTPException) as e:
            raise cut_off(self._server.url, e) from e


class _Watch:
    """Looks after a server that says nothing: the connection to one that hangs is ended, and its reader wakes up."""

    def __init__(self, server: Presence, connection: HTTPConnection) -> None:
        self._server, self._socket, self._over = server, connection.sock, threading.Event()
        self._socket.settimeout(None)
        threading.Thread(target=self._look, name="dnd-watch", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def _look(self) -> None:
        misses = 0
        while misses < MISSES:
            if self._over.wait(WATCH_S):
                return
            misses = 0 if self._server.is_running else misses + 1
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed just now
            return


def cut_off(url: str, error: Exception | None = None) -> ServerError:
    """What is said where an answer stays out or ends too soon."""
    why = "" if error is None else f" ({str(error) or type(error).__name__})"
    return ServerError(f"the server at {url} does not answer to the end{why}", fix=_FIX)


def _headers(server: Presence, body: Body | None, accept: str) -> dict[str, str]:
    kind = {} if body is None else {"Content-Type": body.kind}
    key = {} if server.key is None else {"Authorization": f"Bearer {server.key}"}
    return {"Accept": accept, "Connection": "close", **kind, **key}
