"""Thousands of requests from threads and tasks, some of them cancelled: none wrong, none lost, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import torch
from engine_parts import PROMPTS, ask, idle, soon, strong, tiny_base, tiny_layout

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine, Generation

N = int(os.environ.get("DND_STRESS_REQUESTS", "600"))
ADAPTERS: list[str | None] = [None, *(f"adapter-{i}" for i in range(32))]
THREADS, TASKS = 8, 4
Job = tuple[str, str | None, int]


def job(i: int) -> Job:
    return PROMPTS[i % 5], ADAPTERS[(i * 7) % 33], 2 + i % 4 + i % 2


def request(i: int, cancel: threading.Event | None = None) -> CompletionRequest:
    prompt, adapter, n = job(i)
    return CompletionRequest(prompt, adapter, SamplingOptions(max_new_tokens=n), cancel=cancel)


def test_requests_of_threads_and_tasks() -> None:
    base = tiny_base(layers=1)
    layout = tiny_layout(base)
    engine = Engine(base, layout, n_slots=8, fetch=lambda name: strong(layout, ADAPTERS.index(name)))
    single: dict[tuple[str, str | None], Generation] = {}
    for prompt in PROMPTS:
        for adapter in ADAPTERS:  # shorter answers are what it begins with
            single[prompt, adapter] = ask(engine, prompt, adapter, SamplingOptions(max_new_tokens=6))
    assert soon(lambda: idle(engine))
    n_threads, wrong, answered = threading.active_count(), list[int](), list[int]()

    def check(i: int, text: str, got: Generation | None, *, cancelled: bool = False) -> None:
        prompt, adapter, n = job(i)
        whole = single[prompt, adapter]
        right = whole.text.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        if not cancelled and got is not None:
            right &= got.completion_tokens == min(n, whole.completion_tokens) and got.finish_reason != "cancelled"
        answered.append(i)
        if not right:
            wrong.append(i)

    def by_thread(i: int) -> None:
        kind = i % 40
        if kind == 0:  # cancelled before
            gone = threading.Event()
            gone.set()
            got = engine.complete([request(i, gone)])[0]
            check(i, got.text, got, cancelled=True)
        elif kind == 1:  # while it runs, or after
            event = threading.Event()
            future = engine.submit(request(i, event))
            event.set()
            check(i, future.result().text, None, cancelled=True)
        elif kind == 2:  # closed
            with engine.stream(request(i)) as stream:
                check(i, next(stream, ""), None, cancelled=True)
        elif kind == 3:  # dropped
            engine.stream(request(i))
            answered.append(i)
        elif kind % 3 == 0:
            check(i, "".join(stream := engine.stream(request(i))), stream.generation)
        else:
            got = engine.complete([request(i)])[0]
            check(i, got.text, got)

    async def by_task(numbers: range) -> None:
        for i in numbers:
            future = engine.submit(request(i))
            if i % 10 == 0:
                await asyncio.sleep(0)
                future.cancel()
            try:
                got = await asyncio.wrap_future(future)
                check(i, got.text, got)
            except (asyncio.CancelledError, CancelledError):
                answered.append(i)

    async def tasks(first: int) -> None:
        await asyncio.gather(*(by_task(range(first + t, N, TASKS)) for t in range(TASKS)))

    sizes, tensors = [], []

    def part(numbers: range) -> None:
        for i in numbers:
            by_thread(i)

    rounds = 5
    shared = N * 2 // 3
    with ThreadPoolExecutor(THREADS) as pool:
        beside = pool.submit(asyncio.run, tasks(shared))
        for r in range(rounds):
            mine = range(shared * r // rounds, shared * (r + 1) // rounds)
            list(pool.map(part, [mine[t::THREADS] for t in range(THREADS)]))
            sizes.append(resident_bytes())
        beside.result()
    assert wrong == [] and sorted(answered) == list(range(N))
    assert soon(lambda: idle(engine)) and soon(lambda: threading.active_count() <= n_threads), threading.enumerate()
    engine.close()
    for _ in range(2):  # once more, all has been made that is kept
        list(map(by_thread, range(4, 40, 5)))
        assert soon(lambda: idle(engine))
        engine.close()
        tensors.append(live_tensors())
    assert tensors[0] == tensors[1]
    print(f"{N} requests, resident bytes after each fifth: {[round(size / 2**20) for size in sizes]} MiB")


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


def texts_that_differ(dtype: Any) -> int:
    """For a report: of 200 answers in this precision, how many a shared batch changes."""
    base = tiny_base()
    base.model.to(dtype)
    layout = tiny_layout(base)
    engine = Engine(base, layout, n_slots=8, fetch=lambda name: strong(layout, ADAPTERS.index(name)))
    requests = [
        CompletionRequest(f"{PROMPTS[i % 5]} {i}", ADAPTERS[i % 9], SamplingOptions(max_new_tokens=24))
        for i in range(200)
    ]
    alone = [engine.complete([r])[0].text for r in requests]
    return sum(a != b.text for a, b in zip(alone, engine.complete(requests), strict=True))
