"""Many requests and adapters, servers that are killed or told to stop in the middle: no answer wrong, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_parts import soon
from server_parts import CHAT, chat_body
from tiny_world import World, prompts_of

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.routing import INDEX_FILE, AdapterIndex, compare_saved
from dnd_sdk.routing.vector_file import VectorFile


def test_requests_over_32_adapters_are_all_answered_right(tmp_path: Path) -> None:
    script = Path(__file__).with_name("server_load.py")
    command = [sys.executable, str(script), str(tmp_path / "load"), "--requests", "400"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    report = json.loads(ended.stdout)
    assert report["wrong"] == report["lost"] == report["left"] == 0 and report["p99_ms"] >= report["p50_ms"] > 0


@contextmanager
def command(world: World, *, program: str | None = None) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`dnd serve` in a process of its own (run by `program`, if given), and a client of it."""
    python = [sys.executable, "-m", "dnd_sdk.cli"] if program is None else [sys.executable, "-c", program]
    line = [*python, "serve", *world.options, "--port", "0", "--json", "--quiet"]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    try:
        told = json.loads(running.stdout.readline())
        with httpx.Client(base_url=told["url"], timeout=60, trust_env=False) as http:
            yield running, http
    finally:
        running.kill()
        running.communicate()


def test_killed_in_the_middle_it_has_all_that_it_reported(world: World) -> None:
    reported: list[str] = []

    def adapting(http: httpx.Client, first: int) -> None:
        for i in range(first, 200):
            body = {"prompts": [f"{i} {p}" for p in prompts_of("upper", 5)], "mode": "generate", "name": f"a{i}"}
            try:
                answer = http.post("/dnd/adapt", json=body)
            except httpx.HTTPError:
                return
            assert answer.status_code == 200, answer.text
            reported.append(answer.json()["adapter"]["name"])

    def asking(http: httpx.Client) -> None:
        try:
            while True:
                assert http.post(CHAT, json=chat_body("hi", max_tokens=20)).status_code == 200
        except httpx.HTTPError:
            return

    for round_ in range(2):
        with command(world) as (running, http):
            listed = {a["name"] for a in http.get("/dnd/adapters").json()["data"]}
            assert set(reported) <= listed <= {f"a{i}" for i in range(200)}
            for name in reported[-3:]:
                assert http.post(CHAT, json=chat_body("hi", name, max_tokens=2)).status_code == 200
            n = len(reported)
            threads = [threading.Thread(target=adapting, args=(http, len(listed) + 100 * round_))]
            threads += [threading.Thread(target=asking, args=(http,))]
            for thread in threads:
                thread.start()
            assert soon(lambda n=n: len(reported) > n + 3)
            running.send_signal(signal.SIGKILL)
            for thread in threads:
                thread.join(60)
    store = AdapterStore(world.home)
    assert store.verify() == [] and set(reported) <= {a.name for a in store.ls()}
    world.session().route(prompts_of("upper"))
    for index in (p.parent for p in world.home.index.glob(f"*/{INDEX_FILE}")):
        AdapterIndex(VectorFile.found_in(index).key, index).sync(store)
        assert compare_saved(index, store) == (len(store.ls()), 0)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_told_twice_it_ends_at_once(world: World, sign: signal.Signals) -> None:
    """A request that does not come in whole would hold it for its time to stop."""
    with command(world) as (running, http), socket.create_connection((http.base_url.host, http.base_url.port)) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n".encode())
        assert http.get("/health").status_code == 200
        running.send_signal(sign)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1)
        running.send_signal(sign)
        assert running.wait(20) == 128 + sign


def test_stopping_it_takes_no_more_and_is_not_found(world: World) -> None:
    with command(world) as (running, http):
        url, presence = str(http.base_url), world.home.root / "server.json"
        assert json.loads(presence.read_text())["pid"] == running.pid
        body = chat_body("hi", max_tokens=480, stream=True)
        with http.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)

            def refused() -> bool:
                try:
                    httpx.get(f"{url}/health", trust_env=False)
                except httpx.ConnectError:
                    return True
                return False

            assert soon(refused)
            rest: list[Any] = list(lines)
            assert "data: [DONE]" in rest
        assert running.wait(40) == 0 and not os.path.exists(presence)


def test_work_that_does_not_end_keeps_no_process(world: World) -> None:
    program = """
import time
from dnd_sdk.server import ServerSettings
from dnd_sdk.session import DnD
made = ServerSettings.__init__
ServerSettings.__init__ = lambda self, **given: made(self, **{**given, "shutdown_s": 1.0})
DnD.adapt = lambda *args, **given: time.sleep(300)
from dnd_sdk.cli.main import main
main()
"""
    with command(world, program=program) as (running, http):
        with pytest.raises(httpx.TimeoutException):
            http.post("/dnd/adapt", json={"prompts": ["a"]}, timeout=1)
        running.send_signal(signal.SIGTERM)
        assert running.wait(40) == 0 and not (world.home.root / "server.json").exists()
