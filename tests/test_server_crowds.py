"""Crowds and those that only take room: bounded, told so, and nothing is left of them."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from engine_parts import soon
from hostile_parts import (
    attacked,
    get,
    nothing_left,
    post,
    small_world,
)
from server_parts import CHAT, chat_body
from tiny_world import World, prompts_of

MB = 2**20


def body(**fields: Any) -> Any:
    return chat_body("hi", **{"max_tokens": 2, **fields})


def test_clients_that_take_nothing_are_let_go(world: World) -> None:
    """Also where the answer was complete: the system, the connection and the request each hold some of it."""
    dnd = small_world(world)
    many = {"model": "encoder", "input": [f"text {i}" for i in range(400)]}
    with attacked(dnd, send_bytes=4096) as now, nothing_left(now):
        socks = [now.connect(receive_bytes=2048) for _ in range(12)]
        for i, sock in enumerate(socks):
            sock.sendall(post("/v1/embeddings", many) if i % 2 else post(CHAT, body(max_tokens=480, stream=True)))
        assert now.ask(post(CHAT, body())).status == 200
        assert soon(lambda: not now.server.server_state.connections), now.server.server_state.connections
        for sock in socks:
            sock.close()


def test_a_thousand_streams_at_once(world: World) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3000:
        pytest.skip("this system lets a process open too few files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    dnd, held, n = small_world(world), threading.Event(), 1000
    wanted = {m: dnd.complete("hi", None if m == "base" else m, max_new_tokens=3).text for m in ("base", "upper")}
    # the neighbour asks, too
    with attacked(dnd, head_s=30, max_waiting=n + 8, body_timeout_s=60.0) as now, nothing_left(now):
        # nobody runs until all are in
        busy = dnd.submit("hi", emit=lambda _: held.wait(60) and None, max_new_tokens=1)

        async def one(i: int) -> str:
            host, port = now.served.now.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(post(CHAT, body(model="upper" if i % 2 else "base", max_tokens=3, stream=True) | {"i": i}))
            data = await reader.read()
            writer.close()
            now.tells_nothing(data)
            assert data.startswith(b"HTTP/1.1 200"), data[:300]
            lines = [line for line in data.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: {")]
            choices = [json.loads(line[6:])["choices"][0]["delta"] for line in lines]
            assert b"data: [DONE]" in data
            return "".join(delta.get("content", "") for delta in choices)

        async def all_of_them() -> list[str]:
            tasks = [asyncio.create_task(one(i)) for i in range(n)]
            while dnd.engine.n_waiting < n - 20 and not any(t.done() for t in tasks):
                await asyncio.sleep(0.05)
            held.set()
            return await asyncio.gather(*tasks)

        texts = asyncio.run(all_of_them())
        assert texts == [wanted["upper" if i % 2 else "base"] for i in range(n)] and busy.completion(30)


def test_a_burst_finds_no_more_room_than_there_is(world: World) -> None:
    dnd, held = small_world(world), threading.Event()
    with attacked(dnd, head_s=30, max_waiting=5, body_timeout_s=60.0) as now, nothing_left(now):
        busy = [dnd.submit("hi", emit=lambda _: held.wait(60) and None, max_new_tokens=2) for _ in range(16)]
        assert soon(lambda: dnd.engine.n_waiting == 0 or dnd.engine.n_running > 0)
        with ThreadPoolExecutor(60) as pool:
            asked = [pool.submit(now.ask, post(CHAT, body())) for _ in range(60)]
            assert soon(lambda: sum(a.done() for a in asked) >= 60 - 16 - 6)
            held.set()
        answers = [a.result() for a in asked]
        refused = [a for a in answers if a.status == 429]
        assert len(refused) >= 60 - 16 - 6 and all(b"retry-after" in a.data for a in refused)
        assert all(a.status == 200 for a in answers if a not in refused)
        assert all(b.completion(30) for b in busy)


def test_connections_beyond_the_bound_are_refused(world: World) -> None:
    with attacked(world.elsewhere(), body_timeout_s=30.0) as now:
        now.server.config.app.state.max_connections = 30  # type: ignore[union-attr]
        socks = [now.connect() for _ in range(40)]
        answers = [sock.recv(2**16) for sock in socks[31:]]
        assert all(a.startswith(b"HTTP/1.1 503") and b'"code": "busy"' in a for a in answers), answers
        for sock in socks:
            sock.close()
        assert soon(lambda: now.ask(get("/health")).status == 200)


def open_files() -> list[str]:
    """What each is, where the system tells."""
    found = []
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)


def test_nothing_outlives_its_server(world: World) -> None:
    dnd = small_world(world)
    dnd.route(prompts_of("lower"))  # whatever a session keeps open is open
    threads, files = {t.ident for t in threading.enumerate()}, open_files()
    with attacked(dnd) as now:
        for i in range(20):
            with now.connect() as sock:
                sock.sendall(post(CHAT, body(max_tokens=100 * (i % 3) + 1, stream=bool(i % 2))))
        now.served.http.post("/dnd/route", json={"prompts": prompts_of("lower")})
    assert soon(lambda: not {t.ident for t in threading.enumerate()} - threads), threading.enumerate()
    assert soon(lambda: len(open_files()) <= len(files)), (open_files(), files)
