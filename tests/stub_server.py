"""A stand-in for a server of ours, in a thread: answers what a test has put there, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email import message_from_bytes
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


def read_body(headers: Message, raw: bytes) -> Any:
    """JSON, or a form as the text of each part by its name."""
    kind = headers.get("Content-Type", "")
    if not kind.startswith("multipart/"):
        return json.loads(raw) if raw else None
    whole = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw)
    parts = [part for part in whole.get_payload() if isinstance(part, Message)]
    return {
        str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True).decode()  # type: ignore[union-attr]
        for part in parts
    }


Answer = Callable[["Asked", BaseHTTPRequestHandler], None]


class Stub:
    """Answers by method and path; unknown ones are 404 without a body."""

    def __init__(self, url: str) -> None:
        self.url, self.instance = url, "stub-instance"
        self.asked: list[Asked] = []
        self.answers: dict[tuple[str, str], Answer] = {}
        self.says("GET", "/health", {"status": "ok", "instance": self.instance, "version": "0"})

    def says(self, method: str, path: str, body: object, status: int = 200) -> None:
        """Answer with JSON."""

        def answer(_: Asked, handler: BaseHTTPRequestHandler) -> None:
            raw = json.dumps(body).encode()
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(raw)))
            handler.end_headers()
            handler.wfile.write(raw)

        self.answers[method, path] = answer

    def streams(self, path: str, lines: list[str], then: Callable[[], None] | None = None) -> None:
        """Answer a POST with these server-sent lines, in chunks; `then` is called before the last chunk."""

        def answer(_: Asked, handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Type", "text/event-stream")
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            for line in lines:
                raw = f"{line}\n".encode()
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
                handler.wfile.flush()
            if then is not None:
                then()
            handler.wfile.write(b"0\r\n\r\n")

        self.answers["POST", path] = answer


@contextmanager
def stub_server() -> Iterator[Stub]:
    """A running stub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = Asked(self.command, self.path, dict(self.headers), read_body(self.headers, raw))
            stub.asked.append(asked)
            answer = stub.answers.get((self.command, self.path))
            if answer is None:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            answer(asked, self)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, *_: object) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, ValueError):  # the test has hung up
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub = Stub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
