"""Thousands of requests to two replicas on a local Ray cluster, of which one is killed on the way.

`python tests/ray_load.py FOLDER --requests 2000 --adapters 32 --kill` prints a JSON object; exit code 1 with any fault.

* `wrong`: answers that differ from what a session alone says for that adapter and prompt; `lost`: requests that ended
  with neither an answer nor an error; `told`: those that ended with an error, whose texts are in `errors`.
* `retried`: answers that took a second replica.
* `affinity`: of the answers by adapters, the share whose adapter was in a slot of the replica when the request came;
  `affinity_before`: up to the kill. `by_chance`: what one replica's slots would give, if requests went anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from ray_parts import Cluster, cluster
from server_load import CONCURRENCY, MODELS, N_PROMPTS, PROMPTS, TOKENS, fill
from server_parts import CHAT, chat_body
from tiny_world import make_world

N_SLOTS = 24


class Told(Exception):
    """The request ended with an error that says so."""


@dataclass
class Seen:
    """What became of all requests."""

    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    took_ms: list[float] = field(default_factory=list)
    resident: list[bool] = field(default_factory=list)
    resident_before: int = 0
    """How many of these came before the kill."""
    replicas: Counter[str] = field(default_factory=Counter)
    retried: int = 0

    def head(self, headers: httpx.Headers) -> None:
        """Of one answer."""
        self.replicas[headers["x-dnd-replica"]] += 1
        if "x-dnd-resident" in headers:
            self.resident.append(headers["x-dnd-resident"] == "1")
        self.retried += "x-dnd-attempt" in headers


async def ask_all(
    running: Cluster, models: list[str], n: int, wanted: dict[tuple[str, str], str], *, kill: bool
) -> tuple[Seen, str | None]:
    """Ask; the name of the replica that was killed once half of it was asked."""
    seen, numbers, killed, draws = Seen(), iter(range(n)), None, random.Random(0)

    async def worker(http: httpx.AsyncClient) -> None:
        nonlocal killed
        for i in numbers:
            if kill and i == n // 2:
                seen.resident_before = len(seen.resident)
                [killed] = await asyncio.to_thread(running.kill, 1)
            model, prompt = draws.choice(models), PROMPTS[i % N_PROMPTS]
            body = chat_body(prompt, model, max_tokens=TOKENS[0] + i % 5, stream=i % 3 == 0)
            start = time.perf_counter()
            try:
                text = await _ask(http, body, seen)
            except Told as e:
                seen.told.append(str(e))
            except (httpx.HTTPError, AssertionError, LookupError, ValueError) as e:
                seen.lost.append(repr(e))
            else:
                seen.took_ms.append(1000 * (time.perf_counter() - start))
                whole = wanted[model, prompt]
                right = whole.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}")) and bool(text) == bool(whole)
                seen.wrong += not right

    async with httpx.AsyncClient(base_url=running.url, timeout=120, trust_env=False) as http:
        await asyncio.gather(*(worker(http) for _ in range(CONCURRENCY)))
    return seen, killed


async def _ask(http: httpx.AsyncClient, body: dict[str, Any], seen: Seen) -> str:
    text, done = "", False
    async with http.stream("POST", CHAT, json=body) as answer:
        if answer.status_code != 200:
            raise Told(f"{answer.status_code} {json.loads(await answer.aread())['error']['message']}")
        if not body["stream"]:
            text, done = json.loads(await answer.aread())["choices"][0]["message"]["content"], True
        async for line in answer.aiter_lines() if body["stream"] else _none():
            done |= line == "data: [DONE]"
            chunk = json.loads(line[6:]) if line.startswith("data: {") else {}
            if "error" in chunk:
                raise Told(f"in a stream: {chunk['error']['message']}")
            text += "".join(c["delta"].get("content") or "" for c in chunk.get("choices", ()))
        assert done, "the stream ended early"
        seen.head(answer.headers)
    return text


async def _none() -> Any:
    for line in ():
        yield line


def measure(root: Path, n: int, n_adapters: int, *, kill: bool) -> dict[str, Any]:
    """The figures of one run; the folder must be empty."""
    torch.set_num_threads(1)
    world, models = make_world(root), MODELS[: 1 + n_adapters]
    wanted = fill(world)
    with cluster(world, min_replicas=2, n_slots=N_SLOTS) as running:
        running.wait_for(2)
        start = time.perf_counter()
        seen, killed = asyncio.run(ask_all(running, models, n, wanted, kill=kill))
        seconds = time.perf_counter() - start
        running.wait_for(2)
        left = [httpx.get(f"{running.url}/dnd/status", trust_env=False).json() for _ in range(8)]
    seen.took_ms.sort()
    return {
        "requests": n,
        "adapters": n_adapters,
        "slots": N_SLOTS,
        "wrong": seen.wrong,
        "lost": len(seen.lost),
        "told": len(seen.told),
        "errors": sorted({*seen.lost, *seen.told})[:10],
        "retried": seen.retried,
        "killed": killed,
        "replicas": dict(seen.replicas),
        "affinity": _share(seen.resident),
        "affinity_before": _share(seen.resident[: seen.resident_before or None]),
        "by_chance": round(min(1.0, N_SLOTS / n_adapters), 3),
        "per_s": round(n / seconds, 1),
        "p50_ms": round(seen.took_ms[len(seen.took_ms) // 2], 1),
        "p99_ms": round(seen.took_ms[len(seen.took_ms) * 99 // 100], 1),
        "left": sum(status["running"] + status["waiting"] for status in left),
    }


def _share(found: list[bool]) -> float:
    return round(sum(found) / max(1, len(found)), 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--adapters", type=int, default=len(MODELS) - 1, choices=range(1, len(MODELS)), metavar="1-32")
    parser.add_argument("--kill", action="store_true", help="one replica, when half of the requests are asked")
    options = parser.parse_args()
    with redirect_stdout(sys.stderr):  # Ray says there, too, that a worker has ended
        report = measure(options.folder, options.requests, options.adapters, kill=options.kill)
    print(json.dumps(report, indent=1))
    sys.exit(1 if report["wrong"] or report["lost"] or report["left"] else 0)
