"""What the server costs over the library: the same streams by turns from threads of a program and over HTTP.

The clients run in this process, too: their work counts against the server, as it does where both share a machine.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, cycle, islice
from queue import Queue
from typing import Any, NamedTuple

import httpx

from dnd_sdk.adaptation import stored_for
from dnd_sdk.bench import host, ratio
from dnd_sdk.config import MODEL_PREFIX, whole_number
from dnd_sdk.server.running import Listening, serve
from dnd_sdk.server.settings import ServerSettings
from dnd_sdk.session import DnD

_CHAT = "/v1/chat/completions"
_WARM_UPS = 1


class _Round(NamedTuple):
    """One round of all clients."""

    seconds: float
    n_tokens: int
    first_s: float
    """Median over the clients of the time to their first piece."""


class _Client(NamedTuple):
    prompt: str
    adapter: str | None


def bench_serve(
    dnd: DnD,
    *,
    clients: int = 8,
    rounds: int = 5,
    tokens: int = 32,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Tokens/s of `clients` streams of `tokens` tokens each and time to the first one, library and server by turns.

    Adapters of the home, up to one a client, and the base take turns. Raises `ConfigError` for sizes out of range.
    """
    clients, rounds = whole_number("clients", clients, 1, 1024), whole_number("rounds", rounds, 1, 1000)
    tokens = whole_number("tokens", tokens, 1, 4096)
    asked = _Asked(dnd, tokens)
    taken: dict[str, list[_Round]] = {name: [] for name in ("library", "server", "library_1", "server_1")}
    with _serving(dnd) as url:
        ways = {"library": _by_library, "server": _by_server(url)}
        for turn in range(_WARM_UPS + rounds):
            for name, way in ways.items():
                for n, key in ((clients, name), (1, f"{name}_1")):
                    found = way(asked, list(islice(asked.clients, n)))
                    if turn >= _WARM_UPS:
                        taken[key].append(found)
            if progress is not None:
                progress(turn + 1, _WARM_UPS + rounds, "rounds")
    return {**_summary(taken), "clients": clients, "rounds": rounds, "tokens": tokens, "host": host()}


def render_serve(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{result['clients']} clients   library {result['library_tokens_s']:6.1f} tokens/s   "
        f"server {result['server_tokens_s']:6.1f}   server / library {result['throughput_ratio']:.3f}",
        f"first token  library {result['library_first_ms']:6.0f} ms        "
        f"server {result['server_first_ms']:6.0f}   server / library {result['first_token_ratio']:.3f}",
    ]
    return "\n".join(lines)


class _Asked:
    """Prompts that nobody asked before, each with who answers it."""

    def __init__(self, dnd: DnD, tokens: int) -> None:
        self.dnd, self.tokens = dnd, tokens
        stored = [a.name for a in stored_for(dnd.store, dnd.base)]
        self.clients: Iterator[_Client] = (
            _Client(f"Story {i}: a walk to the {i}th house of the long street.", adapter)
            for i, adapter in zip(count(), cycle([*stored, None]))
        )


def _summary(taken: dict[str, list[_Round]]) -> dict[str, Any]:
    rate = {name: [r.n_tokens / r.seconds for r in found] for name, found in taken.items()}
    first = {name: [r.first_s for r in found] for name, found in taken.items()}
    return {
        "library_tokens_s": statistics.median(rate["library"]),
        "server_tokens_s": statistics.median(rate["server"]),
        "throughput_ratio": ratio(rate["server"], rate["library"]),
        "library_first_ms": 1e3 * statistics.median(first["library_1"]),
        "server_first_ms": 1e3 * statistics.median(first["server_1"]),
        "first_token_ratio": ratio(first["server_1"], first["library_1"]),
        "first_token_under_load_ratio": ratio(first["server"], first["library"]),
    }


def _by_library(asked: _Asked, clients: list[_Client]) -> _Round:
    """A thread a client."""
    start, firsts, n_tokens = time.perf_counter(), list[float](), list[int]()

    def ask(client: _Client) -> None:
        with asked.dnd.stream(client.prompt, client.adapter, max_new_tokens=asked.tokens) as stream:
            next(stream, None)
            firsts.append(time.perf_counter() - start)
            n_tokens.append(stream.result.usage["completion_tokens"])

    threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _Round(time.perf_counter() - start, sum(n_tokens), statistics.median(firsts))


def _by_server(url: str) -> Callable[[_Asked, list[_Client]], _Round]:
    def way(asked: _Asked, clients: list[_Client]) -> _Round:
        return asyncio.run(_over_http(url, asked, clients))

    return way


async def _over_http(url: str, asked: _Asked, clients: list[_Client]) -> _Round:
    """A connection a client."""
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as http:
        await asyncio.gather(*(http.get("/health") for _ in clients))  # connected, as agents are
        start = time.perf_counter()
        found = await asyncio.gather(*(_stream(http, asked, client, start) for client in clients))
        seconds = time.perf_counter() - start
    return _Round(seconds, sum(n for n, _ in found), statistics.median(first for _, first in found))


async def _stream(http: httpx.AsyncClient, asked: _Asked, client: _Client, start: float) -> tuple[int, float]:
    body = {
        "model": f"{MODEL_PREFIX}{client.adapter or 'base'}",
        "messages": [{"role": "user", "content": client.prompt}],
        "max_tokens": asked.tokens,
        "stream": True,
    }
    first, n = 0.0, 0
    async with http.stream("POST", _CHAT, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - start
            n = chunk.get("usage", {}).get("completion_tokens", n)
    return n, first


@contextmanager
def _serving(dnd: DnD) -> Iterator[str]:
    told: Queue[Listening] = Queue()
    run = threading.Thread(target=serve, args=(lambda: dnd, ServerSettings(port=0)), kwargs={"listening": told.put})
    run.start()
    now = told.get()
    try:
        yield now.url
    finally:
        now.stop()
        run.join()
