"""Thousands of requests to a server in a process of its own, over 32 adapters of a tiny base, at one concurrency.

`python tests/server_load.py FOLDER --requests 10000` prints one JSON object: wrong and lost answers, requests a second,
times (ms) to the whole answer, and the server's memory after each fifth; exit code 1 with any fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from server_parts import CHAT, chat_body, serving
from tiny_world import World, make_world

N_ADAPTERS, N_PROMPTS, CONCURRENCY, TOKENS, PARTS = 32, 5, 16, (2, 6), 5
PROMPTS = [f"question {i}" for i in range(N_PROMPTS)]
MODELS = ["base", *(f"a{i}" for i in range(N_ADAPTERS))]


def fill(world: World) -> dict[tuple[str, str], str]:
    """Store the adapters; what each answers to each prompt, asked alone in this process."""
    dnd = world.session(n_slots=8)
    for i in range(N_ADAPTERS):
        dnd.adapt([f"{i} {i * i} task {chr(65 + i) * 3} {k}" for k in range(4)], mode="generate", name=f"a{i}")
    return {
        (model, prompt): dnd.complete(prompt, None if model == "base" else model, max_new_tokens=TOKENS[1]).text
        for model in MODELS
        for prompt in PROMPTS
    }


@contextmanager
def server_process(world: World) -> Iterator[tuple[str, int]]:
    """Url and process id of a server of this home."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with serving(world.session(n_slots=8)) as served:
                os.write(writing, f"{served.now.url}\n".encode())
                time.sleep(3600)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        with os.fdopen(reading) as told:
            yield told.readline().strip(), child
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


async def ask_all(
    url: str, numbers: Sequence[int], wanted: dict[tuple[str, str], str], took_ms: list[float]
) -> tuple[int, int]:
    """How many of these requests had a wrong answer and how many none; their times are added."""
    left, wrong, lost = iter(numbers), 0, 0

    async def worker(http: httpx.AsyncClient) -> None:
        nonlocal wrong, lost
        for i in left:
            model, prompt, n = MODELS[(i * 7) % len(MODELS)], PROMPTS[i % N_PROMPTS], TOKENS[0] + i % 5
            start = time.perf_counter()
            try:
                text = await _ask(http, chat_body(prompt, model, max_tokens=n), stream=i % 3 == 0)
            except (httpx.HTTPError, AssertionError, LookupError, ValueError):
                lost += 1
                continue
            took_ms.append(1000 * (time.perf_counter() - start))
            whole = wanted[model, prompt]
            wrong += not (whole.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}")) and bool(text) == bool(whole))

    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
        await asyncio.gather(*(worker(http) for _ in range(CONCURRENCY)))
    return wrong, lost


async def _ask(http: httpx.AsyncClient, body: dict[str, Any], *, stream: bool) -> str:
    if not stream:
        answer = await http.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]
    text, done = "", False
    async with http.stream("POST", CHAT, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            done |= line == "data: [DONE]"
            if line.startswith("data: {"):
                text += "".join(c["delta"].get("content") or "" for c in json.loads(line[6:])["choices"])
    assert done
    return text


def measure(root: Path, n: int) -> dict[str, Any]:
    """The figures of one run; the folder must be empty."""
    torch.set_num_threads(1)  # a forked process has no others
    world = make_world(root)
    wanted = fill(world)
    with server_process(world) as (url, pid):
        took_ms, sizes, wrong, lost = list[float](), list[float](), 0, 0
        start = time.perf_counter()
        for part in range(PARTS):
            numbers = range(n * part // PARTS, n * (part + 1) // PARTS)
            more_wrong, more_lost = asyncio.run(ask_all(url, numbers, wanted, took_ms))
            wrong, lost = wrong + more_wrong, lost + more_lost
            sizes.append(round(_resident_mb(pid), 1))
        seconds = time.perf_counter() - start
        status = httpx.get(f"{url}/dnd/status", trust_env=False).json()
    took_ms.sort()
    return {
        "requests": n,
        "wrong": wrong,
        "lost": lost,
        "per_s": round(n / seconds, 1),
        "p50_ms": round(took_ms[len(took_ms) // 2], 1),
        "p99_ms": round(took_ms[len(took_ms) * 99 // 100], 1),
        "resident_mb": sizes,
        "growth_mb": [round(b - a, 1) for a, b in pairwise(sizes)],
        "left": status["running"] + status["waiting"],
    }


def _resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    report = measure(options.folder, options.requests)
    print(json.dumps(report, indent=1))
    sys.exit(1 if report["wrong"] or report["lost"] or report["left"] else 0)
