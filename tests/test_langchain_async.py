"""`DnDChat` never blocks the event loop, and stops generating when nobody waits for the answer any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from paced import NoThreads, Pace, cancel_after, endless, generating, loop_runs, put_adapter, stopped_after, wait_until
from tiny_world import World

from dnd_sdk.session import MAX_THREADS, DnD

pytest.importorskip("langchain_core")

from langchain_core.callbacks import BaseCallbackHandler

from dnd_sdk.integrations.langchain import DnDChat


@pytest.fixture
def dnd(world: World) -> DnD:
    return endless(world.session())


@pytest.fixture
def pace(dnd: DnD) -> Pace:
    return Pace(dnd.base.model)


@pytest.fixture
def chat(dnd: DnD) -> DnDChat:
    return DnDChat(dnd, adapter=None, max_tokens=200)


async def streamed(chat: DnDChat, **options: Any) -> str:
    return "".join([c.text async for c in chat.astream("hello", **options)])


async def events(chat: DnDChat, **options: Any) -> str:
    stream = await chat.astream_events("hello", version="v3", **options)
    try:
        return str((await stream.output).text)
    finally:
        await stream.aclose()  # LangChain's own task reads on for others who may hold the stream


ASYNC: dict[str, Callable[..., Awaitable[str]]] = {
    "ainvoke": lambda chat, **o: chat.ainvoke("hello", **o),
    "astream": streamed,
    "events": events,
    "abatch": lambda chat, **o: chat.abatch(["hello"], **o),
}


@pytest.mark.parametrize("way", ASYNC)
def test_the_loop_runs_while_the_engine_works(chat: DnDChat, pace: Pace, way: str) -> None:
    async def run() -> Any:
        return await loop_runs(ASYNC[way](chat, max_tokens=8), pace.allow)

    assert asyncio.run(run()) and pace.tokens == 8


def test_the_loop_runs_while_the_base_is_loaded(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def load(*args: Any, **kwargs: Any) -> DnD:
        assert go_on.wait(10), "the event loop is blocked"
        return dnd

    monkeypatch.setattr(DnD, "load", load)

    async def run() -> list[Any]:
        chat = DnDChat(adapter=None, max_tokens=2)
        return await loop_runs(asyncio.gather(chat.ainvoke("hello"), streamed(chat)), go_on.set)

    whole, pieces = asyncio.run(run())
    assert whole.text == pieces


def test_many_calls_at_once_leave_the_loops_own_threads_alone(chat: DnDChat, pace: Pace) -> None:
    async def run() -> int:
        asyncio.get_running_loop().set_default_executor(NoThreads(1))
        calls = [asyncio.ensure_future(chat.ainvoke("hi", max_tokens=1)) for _ in range(MAX_THREADS + 8)]
        await asyncio.sleep(0.01)
        pace.allow()
        return len(await asyncio.gather(*calls))

    assert asyncio.run(run()) == MAX_THREADS + 8


@pytest.mark.parametrize("way", ASYNC)
def test_cancelling_the_task_stops_within_a_token(chat: DnDChat, pace: Pace, way: str) -> None:
    async def run() -> None:
        await cancel_after(3, ASYNC[way](chat), pace)  # type: ignore[arg-type]
        await asyncio.to_thread(stopped_after, pace, 4)

    asyncio.run(run())


class KeepsErrors(BaseCallbackHandler):
    """As tracing tools may: an exception keeps the frames it went through, and generators in them."""

    def __init__(self) -> None:
        self.kept: list[BaseException] = []

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.kept.append(error)


@pytest.fixture(params=[False, True], ids=["", "errors-kept"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"callbacks": [KeepsErrors()] if request.param else []}


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_leaving_a_stream_stops_within_a_token(chat: DnDChat, pace: Pace, config: Any, leave: str) -> None:
    pace.allow(3)
    stream = chat.stream("hello", config)
    next(stream)
    if leave == "close":
        stream.close()  # type: ignore[attr-defined]
    del stream
    stopped_after(pace, 4)


@pytest.mark.parametrize("leave", ["close", "break"])
def test_leaving_an_async_stream_stops_within_a_token(chat: DnDChat, pace: Pace, config: Any, leave: str) -> None:
    async def run() -> None:
        pace.allow(3)
        stream = chat.astream("hello", config)
        async for _ in stream:
            break
        if leave == "close":
            await stream.aclose()  # type: ignore[attr-defined]
        del stream
        await asyncio.sleep(0.05)  # asyncio closes a dropped generator in a task of its own
        await asyncio.to_thread(stopped_after, pace, 4)

    asyncio.run(run())


def test_a_stream_nobody_reads_does_no_work(chat: DnDChat, pace: Pace) -> None:
    stream = chat.stream("hello")
    assert not generating()
    stream.close()  # type: ignore[attr-defined]
    assert pace.tokens == 0


def test_the_slot_of_a_cancelled_call_is_free_at_once(dnd: DnD, pace: Pace) -> None:
    for i in range(5):
        put_adapter(dnd, f"a{i}", seed=i)  # one more than there are slots

    async def run() -> None:
        for i in range(5):
            await cancel_after(pace.tokens + 2, DnDChat(dnd, adapter=f"a{i}").ainvoke("hello"), pace)

    asyncio.run(run())
    pace.allow()
    wait_until(lambda: not generating(), "the engine still generates")
    dnd.close()
    assert dnd.engine.bank.resident() == []
