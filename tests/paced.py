"""A tiny base that makes a token only when it is told to, and what tests of asynchronous answers share."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_parts import generating as generating
from helpers import random_flat

from dnd_sdk.session import DnD


class Pace:
    """A model that makes one token per `allow`; a test that never allows fails instead of hanging."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens = 0
        self._permits = threading.Semaphore(0)
        real = model.forward

        @functools.wraps(real)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._permits.acquire(timeout=10):
                raise TimeoutError("nobody allowed the next token: is the event loop blocked?")
            self.tokens += 1
            return real(*args, **kwargs)

        model.forward = forward

    def allow(self, n: int = 100_000) -> None:
        """Let `n` more tokens be made."""
        self._permits.release(n)


class NoThreads(ThreadPoolExecutor):
    """A default executor that must not be used."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the loop's default executor was used")


async def cancel_after(tokens: int, work: Coroutine[Any, Any, Any], pace: Pace) -> None:
    """Cancel an answer when it has so many tokens; whoever waits for it must be told."""
    task = asyncio.create_task(work)
    pace.allow(tokens)
    while pace.tokens < tokens and not task.done():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def stopped_after(pace: Pace, tokens: int) -> None:
    """Nothing generates any more, though it could, and no more than `tokens` were made."""
    pace.allow()
    wait_until(lambda: not generating(), "the engine still generates")
    assert pace.tokens <= tokens


async def loop_runs(while_waiting: Awaitable[Any], go_on: Callable[[], None]) -> Any:
    """The event loop must turn a hundred times while the work stands still; then let it go on."""
    task = asyncio.ensure_future(while_waiting)
    for _ in range(100):
        await asyncio.sleep(0.001)
        assert not task.done()
    go_on()
    return await task


def endless(dnd: DnD) -> DnD:
    """Make a tiny base never end its answer by itself."""
    with torch.no_grad():
        dnd.base.model.get_output_embeddings().weight[dnd.base.tokenizer.eos_token_id] = 0.0
    return dnd


def put_adapter(dnd: DnD, name: str, seed: int) -> None:
    """Store random weights that change a tiny base's answers."""
    flat = random_flat(dnd.layout, seed=seed, std=0.3)
    dnd.store.put(
        flat, dnd.layout, base_name="tiny", base_fingerprint=dnd.base.fingerprint, source="trained", name=name
    )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait at most 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
