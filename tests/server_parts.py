"""A server in a thread of this process, asked over real sockets."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any, NamedTuple

import httpx
from engine_parts import soon

from dnd_sdk.server import Listening, ServerSettings, serve
from dnd_sdk.session import DnD

CHAT = "/v1/chat/completions"


class Served(NamedTuple):
    """A running server and a client of it."""

    dnd: DnD
    now: Listening
    http: httpx.Client

    def post(self, path: str, body: Any, **more: Any) -> Any:
        """The answer's object; it must be one."""
        answer = self.http.post(path, json=body, **more)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    def chat(self, text: str, model: str = "base", **fields: Any) -> Any:
        """Ask one question."""
        return self.post(CHAT, chat_body(text, model, **fields))

    def problem(self, method: str, path: str, **more: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of a request that must fail."""
        answer = self.http.request(method, path, **more)
        assert answer.status_code >= 400, answer.text
        return answer.status_code, error_of(answer)


@contextmanager
def serving(dnd: DnD, **settings: Any) -> Iterator[Served]:
    """Serve a session on a free port until the end of the block."""
    told: Queue[Listening | BaseException] = Queue()

    def run() -> None:
        try:
            serve(lambda: dnd, ServerSettings(**{"port": 0, "shutdown_s": 5.0, **settings}), listening=told.put)
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=run, name="test-server")
    thread.start()
    now = told.get(timeout=60)
    if isinstance(now, BaseException):
        raise now
    try:
        with httpx.Client(base_url=now.url, timeout=60, trust_env=False) as http:
            yield Served(dnd, now, http)
    finally:
        now.stop()
        thread.join(30)
    assert not thread.is_alive()


def chat_body(text: str, model: str = "base", **fields: Any) -> dict[str, Any]:
    """A chat of one question; the model's name without its prefix."""
    return {"model": f"dnd:{model}", "messages": [{"role": "user", "content": text}], **fields}


def events(lines: Iterator[str]) -> list[Any]:
    """The objects of a stream, `[DONE]` as text."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def streamed(served: Served, path: str, body: dict[str, Any]) -> list[Any]:
    """All events of one stream."""
    with served.http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events(answer.iter_lines())


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's form."""
    error: dict[str, Any] = answer.json()["error"]
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
    assert {"param", "code"} <= error.keys()
    return error


def quiet(dnd: DnD) -> bool:
    """Whether the engine comes to rest."""
    return soon(lambda: dnd.engine.n_running == 0 and dnd.engine.n_waiting == 0)


def connect(served: Served) -> socket.socket:
    """A bare socket to the server, on which anything can be sent, and cut anywhere."""
    url = httpx.URL(served.now.url)
    return socket.create_connection((url.host, url.port), timeout=20)


class HeldEncoder:
    """Inside the block whoever embeds stands still until `go_on` is set."""

    def __init__(self, dnd: DnD) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self._encoder, self._embed = dnd.encoder, dnd.encoder.embed

    def _held(self, texts: Any) -> Any:
        self.began.set()
        self.go_on.wait(20)
        return self._embed(texts)

    def __enter__(self) -> HeldEncoder:
        self._encoder.embed = self._held  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        self.go_on.set()
        del self._encoder.embed  # type: ignore[method-assign]
