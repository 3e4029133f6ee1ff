"""Bare sockets against a server, what its answers must never tell, and what must be left once they are gone."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from engine_parts import idle, soon
from server_parts import CHAT, Served, chat_body, serving, streamed
from tiny_world import World, prompts_of

import dnd_sdk
from dnd_sdk.engine.row import Row
from dnd_sdk.server import running

HEAD_S, TIMEOUT_S = 1, 1.0
"""For a head and for a body to come in."""
BOUND_S = 60.0
"""No answer may take longer, however slow the machine is."""


class Answer(NamedTuple):
    """What came over a socket until it was closed."""

    data: bytes
    seconds: float

    @property
    def status(self) -> int | None:
        """None: closed without a word."""
        return int(self.data.split(b" ", 2)[1]) if self.data.startswith(b"HTTP/1.1 ") else None

    @property
    def error(self) -> Any:
        """The error of the last answer, which must have OpenAI's form."""
        error = json.loads(self.data.rpartition(b"\r\n\r\n")[2])["error"]
        assert {"message", "type", "param", "code"} <= error.keys() and error["message"]
        return error


class Attacked(NamedTuple):
    """A server that is attacked."""

    served: Served
    server: running._Server
    loop: asyncio.AbstractEventLoop
    secrets: tuple[bytes, ...]
    """What no answer may hold."""

    def connect(self, timeout: float = BOUND_S, receive_bytes: int | None = None) -> Any:
        """A socket; with few `receive_bytes` the server notices soon that nothing is read."""
        import socket

        host, port = self.served.now.url.removeprefix("http://").split(":")
        sock = socket.socket()
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.settimeout(timeout)
        sock.connect((host, int(port)))
        return sock

    def ask(self, *pieces: bytes, half_close: bool = False) -> Answer:
        """Send these, then read until the server closes; `half_close`: say that nothing further comes."""
        import socket

        began, data = time.monotonic(), b""
        with self.connect() as sock:
            with suppress(ConnectionError):  # it need not read all of it
                for piece in pieces:
                    sock.sendall(piece)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while piece := sock.recv(2**16):
                    data += piece
        self.tells_nothing(data)
        return Answer(data, time.monotonic() - began)

    def tells_nothing(self, data: bytes) -> None:
        """An answer holds no path of this machine and no traceback."""
        for secret in self.secrets:
            assert secret not in data, (secret, data)

    @property
    def left(self) -> Counter[str]:
        """What there is now of all that an attack could leave behind."""
        gc.collect()
        dnd = self.served.dnd
        threads = [t.name for t in threading.enumerate() if not t.name.startswith("AnyIO")]
        return Counter(
            {
                "tasks": len(asyncio.all_tasks(self.loop)),
                "connections": len(self.server.server_state.connections),
                "files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
                "threads": len(threads),
                "rows": dnd.engine.n_running + dnd.engine.n_waiting,
                "leases": 0 if dnd.engine.local is None else int(not idle(dnd.engine.local)),
            }
        )


@contextmanager
def attacked(dnd: Any, *, send_bytes: int | None = None, head_s: int = HEAD_S, **settings: Any) -> Iterator[Attacked]:
    """Serve with short times; `send_bytes` bounds what the system holds of an answer that is not taken."""
    found: list[tuple[running._Server, asyncio.AbstractEventLoop]] = []
    with pytest.MonkeyPatch.context() as patch:
        startup, made = running._Server.startup, running._Connection.connection_made

        async def noted(self: running._Server, sockets: Any = None) -> None:
            found.append((self, asyncio.get_running_loop()))
            await startup(self, sockets)

        def narrow(self: running._Connection, transport: Any) -> None:
            import socket

            if send_bytes is not None:
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
            made(self, transport)

        patch.setattr(running._Server, "startup", noted)
        patch.setattr(running._Connection, "connection_made", narrow)
        patch.setattr(running, "_KEEP_ALIVE_S", head_s)
        with serving(dnd, **{"body_timeout_s": TIMEOUT_S, **settings}) as served:
            served.http.headers["connection"] = "close"  # so that none of it is taken for what the server left
            yield Attacked(served, *found[0], secrets(dnd))


def secrets(dnd: Any) -> tuple[bytes, ...]:
    """Folders of this machine that an error could tell, and what tracebacks look like."""
    folders = {dnd.home.root, dnd.home.root.parent, Path(dnd_sdk.__file__).parent, sys.prefix, os.getcwd()}
    return (*(str(folder).encode() for folder in folders), b"Traceback", b'File \\"', b"site-packages")


@contextmanager
def nothing_left(now: Attacked) -> Iterator[None]:
    """After the block everything is as it was, within the time that connections are kept."""
    now.served.http.get("/health")
    before = now.left
    yield
    now.served.http.get("/health")
    assert soon(lambda: now.left <= before), (now.left, before)


class Neighbour:
    """Somebody who asks `upper` again and again, beside the attacks; each of its tokens must come in the next step."""

    def __init__(self, now: Attacked, patch: pytest.MonkeyPatch) -> None:
        self._served, dnd = now.served, now.served.dnd
        self._body = chat_body(prompts_of("upper")[0], "upper", max_tokens=60)
        self.texts, self.gaps = list[str](), Counter[int]()
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._run)
        self.wanted = dnd.complete(prompts_of("upper")[0], "upper", max_new_tokens=60).text
        scheduler, take, mine = dnd.engine.local._scheduler, Row.take, dnd.store.get("upper").id
        last: dict[int, int] = {}

        def counted(row: Row, token: int) -> None:
            if row.request.adapter_id == mine:
                step = scheduler._n_steps
                if id(row) in last and row._tokens:
                    self.gaps[step - last[id(row)]] += 1
                last[id(row)] = step
            take(row, token)

        patch.setattr(Row, "take", counted)

    def _run(self) -> None:
        while not self._stop.is_set() or not self.texts:
            chunks = streamed(self._served, CHAT, self._body)
            assert chunks[-1] == "[DONE]"
            self.texts.append("".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(BOUND_S)
        assert not self._thread.is_alive() and set(self.texts) == {self.wanted}, self.texts
        assert set(self.gaps) == {1}, self.gaps


def get(path: str | bytes, *headers: bytes, host: bytes = b"localhost") -> bytes:
    """The bytes of a request without a body."""
    path = path.encode() if isinstance(path, str) else path
    lines = [b"GET " + path + b" HTTP/1.1", b"Host: " + host, b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def post(path: str, body: Any, *headers: bytes, kind: bytes = b"application/json") -> bytes:
    """The bytes of a request whose body is said to be JSON."""
    return post_head(path, len(as_bytes(body)), *headers, kind=kind) + as_bytes(body)


def post_head(path: str, n_bytes: int, *headers: bytes, kind: bytes = b"application/json") -> bytes:
    """Its head alone."""
    length = b"Content-Length: %d" % n_bytes
    return b"\r\n".join([*_posted(path, kind), length, *headers]) + b"\r\n\r\n"


def chunked(path: str, pieces: Sequence[bytes], kind: bytes = b"application/json") -> Iterator[bytes]:
    """A request whose length nobody is told."""
    yield b"\r\n".join([*_posted(path, kind), b"Transfer-Encoding: chunked"]) + b"\r\n\r\n"
    for piece in pieces:
        yield b"%x\r\n" % len(piece) + piece + b"\r\n"
    yield b"0\r\n\r\n"


def as_bytes(body: Any) -> bytes:
    """JSON, unless it is bytes."""
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def resident_mb() -> float:
    """Of this process; None of it is asked of systems without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


def small_world(world: World) -> Any:
    """A session with the adapter `upper`."""
    dnd = world.session()
    dnd.adapt(prompts_of("upper"), name="upper")
    return dnd


def _posted(path: str, kind: bytes) -> list[bytes]:
    return [
        b"POST " + path.encode() + b" HTTP/1.1",
        b"Host: localhost",
        b"Connection: close",
        b"Content-Type: " + kind,
    ]
