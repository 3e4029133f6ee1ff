"""Clients that leave, and a server that is told to stop: nothing keeps running, nothing hangs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engine_parts import soon
from server_parts import CHAT, HeldEncoder, Served, chat_body, connect, quiet, serving, streamed
from tiny_world import World

from dnd_sdk.errors import ConfigError


@pytest.fixture
def served(world: World) -> Iterator[Served]:
    with serving(world.session()) as now:
        yield now


def raw_request(served: Served, body: dict[str, Any]) -> socket.socket:
    """A request on a bare socket, which can be cut anywhere."""
    sock = connect(served)
    text = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sock.sendall(head.encode() + f"content-length: {len(text)}\r\n\r\n".encode() + text)
    return sock


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(served: Served, stream: bool) -> None:
    sock = raw_request(served, chat_body("hi", max_tokens=400, stream=stream, n=3))
    assert soon(lambda: served.dnd.engine.n_running == 3)
    sock.close()
    assert quiet(served.dnd)
    assert served.chat("hi", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_one_that_leaves_while_it_waits_is_forgotten(served: Served) -> None:
    held = threading.Event()
    busy = [served.dnd.submit("hi", emit=lambda _: held.wait(20) and None, max_new_tokens=2) for _ in range(16)]
    sock = raw_request(served, chat_body("hi", max_tokens=400, stream=True))
    assert soon(lambda: served.dnd.engine.n_waiting >= 1)
    sock.close()
    time.sleep(0.2)
    held.set()
    assert all(b.completion(30) for b in busy) and quiet(served.dnd)


def test_one_that_leaves_before_its_answer_begins(served: Served) -> None:
    """The adapter is still being chosen when the client has gone."""
    with HeldEncoder(served.dnd) as held:
        sock = raw_request(served, chat_body("hi", "auto", max_tokens=400))
        assert held.began.wait(20)
        sock.close()
        held.go_on.set()
    assert quiet(served.dnd) and served.http.get("/health").status_code == 200


def test_an_error_of_one_choice_ends_them_all(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = type(served.dnd).submit, list[int]()

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ConfigError("the third does not come")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(served.dnd), "submit", failing)
    status, error = served.problem("POST", CHAT, json=chat_body("hi", n=4, max_tokens=400))
    assert (status, error["message"]) == (400, "the third does not come") and quiet(served.dnd)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(served: Served, monkeypatch: Any) -> None:
    from dnd_sdk.engine.row import Row

    real, n = Row.take, [0]

    def breaking(self: Row, token: int) -> None:
        n[0] += 1
        if n[0] == 4:
            raise RuntimeError("/home/me/model.bin broke")
        real(self, token)

    monkeypatch.setattr(Row, "take", breaking)
    chunks = streamed(served, CHAT, chat_body("hi", max_tokens=50))
    assert chunks[-1] == {
        "error": {
            "message": "the server failed; its log says how",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    assert quiet(served.dnd)


def test_many_streams_at_once_are_all_right(served: Served) -> None:
    wanted = {i: served.dnd.complete(f"word {i}", max_new_tokens=6).text for i in range(40)}

    async def ask(http: httpx.AsyncClient, i: int) -> str:
        body = chat_body(f"word {i}", max_tokens=6, stream=True)
        text = ""
        async with http.stream("POST", CHAT, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    text += choices[0]["delta"].get("content", "") if choices else ""
        return text

    async def all_of_them() -> list[str]:
        async with httpx.AsyncClient(base_url=served.now.url, timeout=60, trust_env=False) as http:
            return list(await asyncio.gather(*(ask(http, i) for i in range(40))))

    assert dict(enumerate(asyncio.run(all_of_them()))) == wanted


def test_stopping_lets_running_answers_end(world: World) -> None:
    dnd = world.session()
    wanted = dnd.complete("hi", max_new_tokens=60).text
    with serving(dnd) as now:
        got: list[Any] = []
        asking = threading.Thread(target=lambda: got.append(now.chat("hi", max_tokens=60)))
        asking.start()
        assert soon(lambda: dnd.engine.n_running == 1)
        now.now.stop()
        asking.join(20)
        assert got[0]["choices"][0]["message"]["content"] == wanted
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{now.now.url}/health", trust_env=False)


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_listens_answers_and_ends(world: World, sign: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "dnd_sdk.cli", "serve", *world.options, "--port", "0", "--json"]
    environment = {**os.environ, "DND_API_KEY": "me=a-long-secret"}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert running.stdout is not None
    try:
        told = json.loads(running.stdout.readline())
        assert told["pid"] == running.pid and told["schema_version"] == 1
        with httpx.Client(base_url=told["url"], timeout=60, trust_env=False) as http:
            assert http.get("/v1/models").status_code == 401
            http.headers["authorization"] = "Bearer a-long-secret"
            body = chat_body("hi", max_tokens=40, stream=True)
            with http.stream("POST", CHAT, json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                running.send_signal(sign)
                assert "data: [DONE]" in list(lines)  # what runs is finished
        _, stderr = running.communicate(timeout=30)
    finally:
        running.kill()
    assert running.returncode == code, stderr
    assert "Traceback" not in stderr and "a-long-secret" not in stderr and '"key": "me"' in stderr
