"""`DnDLLM` never blocks the event loop, and stops generating when nobody waits for the answer any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llamaindex_parts import aread, call, events  # noqa: F401
from paced import NoThreads, Pace, cancel_after, endless, generating, loop_runs, stopped_after
from tiny_world import World

from dnd_sdk.integrations.llamaindex import DnDEmbedding, DnDLLM
from dnd_sdk.session import MAX_THREADS, DnD

ASYNC = ("acomplete", "achat", "astream_complete", "astream_chat")
SYNC_STREAMS = ("stream_complete", "stream_chat")
ASYNC_STREAMS = ("astream_complete", "astream_chat")


@pytest.fixture
def dnd(world: World) -> DnD:
    return endless(world.session())


@pytest.fixture
def pace(dnd: DnD) -> Pace:
    return Pace(dnd.base.model)


@pytest.fixture
def llm(dnd: DnD) -> DnDLLM:
    return DnDLLM(dnd, adapter=None, max_new_tokens=200)


@pytest.mark.parametrize("method", ASYNC)
def test_the_loop_runs_while_the_engine_works(llm: DnDLLM, pace: Pace, method: str) -> None:
    async def run() -> Any:
        return await loop_runs(aread(call(llm, method, "hello", max_tokens=8)), pace.allow)

    assert asyncio.run(run()).raw["usage"]["completion_tokens"] == 8 == pace.tokens


def test_the_loop_runs_while_the_base_is_loaded(world: World, dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def load(*args: Any, **kwargs: Any) -> DnD:
        assert go_on.wait(10), "the event loop is blocked"
        return dnd

    monkeypatch.setattr(DnD, "load", load)

    async def run() -> list[Any]:
        llm = DnDLLM(adapter=None, max_new_tokens=2)
        both = asyncio.gather(llm.acomplete("hello"), aread(llm.astream_complete("hello")))
        return await loop_runs(both, go_on.set)

    assert len({r.text for r in asyncio.run(run())}) == 1


@pytest.mark.parametrize("method", ["_aget_query_embedding", "_aget_text_embedding", "_aget_text_embeddings"])
def test_the_loop_runs_while_the_encoder_works(dnd: DnD, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    go_on = threading.Event()
    real = dnd.encoder.encode

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert go_on.wait(10), "the event loop is blocked"
        return real(*args, **kwargs)

    monkeypatch.setattr(dnd.encoder, "encode", slow)

    async def run() -> Any:
        given = ["hello"] if method.endswith("s") else "hello"
        return await loop_runs(getattr(DnDEmbedding(dnd), method)(given), go_on.set)

    assert len(asyncio.run(run()))


def test_many_calls_at_once_leave_the_loops_own_threads_alone(llm: DnDLLM, pace: Pace) -> None:
    async def run() -> int:
        asyncio.get_running_loop().set_default_executor(NoThreads(1))
        calls = [asyncio.ensure_future(llm.acomplete("hi", max_tokens=1)) for _ in range(MAX_THREADS + 8)]
        await asyncio.sleep(0.01)
        pace.allow()
        return len(await asyncio.gather(*calls))

    assert asyncio.run(run()) == MAX_THREADS + 8


@pytest.fixture(params=[False, True], ids=["", "events-kept"])
def check_events(llm: DnDLLM, request: pytest.FixtureRequest) -> Callable[[], None]:
    """Also where a tracing tool keeps the events, whose exceptions keep LlamaIndex's own generator alive."""
    debug = LlamaDebugHandler(print_trace_on_end=False)
    if request.param:
        request.getfixturevalue("events")
        llm.callback_manager = CallbackManager([debug])

    def check() -> None:
        assert [len(pair) for pair in debug.get_event_pairs(CBEventType.LLM)] == [2] * request.param

    return check


@pytest.mark.parametrize("method", SYNC_STREAMS)
def test_closing_a_stream_stops_within_a_token(
    llm: DnDLLM, pace: Pace, check_events: Callable[[], None], method: str
) -> None:
    pace.allow(3)
    stream = call(llm, method, "hello")
    next(stream)
    stream.close()
    stopped_after(pace, 4)
    check_events()


@pytest.mark.parametrize("method", ASYNC_STREAMS)
def test_aclosing_a_stream_stops_within_a_token(
    llm: DnDLLM, pace: Pace, check_events: Callable[[], None], method: str
) -> None:
    async def run() -> None:
        pace.allow(3)
        stream = await call(llm, method, "hello")
        await anext(stream)
        await stream.aclose()
        await asyncio.to_thread(stopped_after, pace, 4)  # while the loop still runs, whose end would stop it too

    asyncio.run(run())
    check_events()


@pytest.mark.parametrize("method", SYNC_STREAMS)
def test_dropping_a_stream_stops_within_a_token(llm: DnDLLM, pace: Pace, method: str) -> None:
    pace.allow(3)
    for _ in call(llm, method, "hello"):
        break
    stopped_after(pace, 4)


@pytest.mark.parametrize("method", ASYNC_STREAMS)
def test_leaving_an_async_stream_stops_within_a_token(llm: DnDLLM, pace: Pace, method: str) -> None:
    async def run() -> None:
        pace.allow(3)
        async for _ in await call(llm, method, "hello"):
            break
        await asyncio.sleep(0.05)  # asyncio closes a dropped generator in a task of its own
        await asyncio.to_thread(stopped_after, pace, 4)

    asyncio.run(run())


@pytest.mark.parametrize("method", ASYNC)
def test_cancelling_the_task_stops_within_a_token(llm: DnDLLM, pace: Pace, method: str) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm.callback_manager = CallbackManager([debug])

    async def run() -> None:
        await cancel_after(3, aread(call(llm, method, "hello")), pace)
        await asyncio.to_thread(stopped_after, pace, 4)

    asyncio.run(run())
    assert [len(pair) for pair in debug.get_event_pairs(CBEventType.LLM)] == [2]


@pytest.mark.parametrize("method", SYNC_STREAMS)
def test_a_stream_nobody_reads_does_no_work(llm: DnDLLM, pace: Pace, method: str) -> None:
    stream = call(llm, method, "hello")
    assert not generating()
    stream.close()
    assert pace.tokens == 0 and list(stream) == []


def test_a_slow_reader_does_not_hold_up_the_engine(llm: DnDLLM, pace: Pace) -> None:
    async def run() -> int:
        pace.allow()
        stream = await llm.astream_complete("hello", max_tokens=20)
        await anext(stream)
        while generating():
            await asyncio.sleep(0.001)
        return 1 + len([item async for item in stream])

    assert asyncio.run(run()) > 10
    assert pace.tokens == 20
