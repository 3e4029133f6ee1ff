"""`DnD.submit`: a request handed in without waiting, and the backends' own `submit` behind it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest
from engine_parts import generating, soon
from tiny_world import World, prompts_of

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest
from dnd_sdk.errors import AdapterNotFoundError, ConfigError, DndError, InputError
from dnd_sdk.session import DnD


@pytest.fixture(params=["embedded", "fake"])
def dnd(world: World, request: pytest.FixtureRequest) -> DnD:
    """The same must hold wherever the base runs."""
    made = world.session() if request.param == "embedded" else world.elsewhere()
    made.adapt(prompts_of("upper"), name="upper")
    return made


@pytest.mark.parametrize("adapter", [None, "upper", "auto"])
def test_it_comes_to_what_complete_says(dnd: DnD, adapter: str | None) -> None:
    prompt, pieces = prompts_of("upper")[3], list[str]()
    submitted = dnd.submit(prompt, adapter, emit=pieces.append, max_new_tokens=9)
    got = submitted.completion(30)
    assert got == dnd.complete(prompt, adapter, max_new_tokens=9)
    assert "".join(pieces) == got.text and got.usage["completion_tokens"] <= 9
    assert (submitted.chosen.adapter and submitted.chosen.adapter.name) == got.adapter


def test_a_routed_one_tells_how_near_its_adapter_is(dnd: DnD) -> None:
    prompt = prompts_of("upper")[3]
    route = dnd.route(prompt)
    got = dnd.submit(prompt, "auto", max_new_tokens=2).completion(30)
    assert got.score == route.score is not None
    assert dnd.submit(prompt, "upper", max_new_tokens=2).completion(30).score is None


def test_cancelling_its_future_ends_the_work(dnd: DnD) -> None:
    held = threading.Event()
    submitted = dnd.submit("hi " * 9, emit=lambda _: held.wait(20), max_new_tokens=200)  # no further than one piece
    assert submitted.future.cancel()
    held.set()
    assert soon(lambda: not generating())
    with pytest.raises(CancelledError):
        submitted.completion(1)


def test_asyncio_awaits_many_without_a_thread_each(dnd: DnD) -> None:
    async def all_of_them() -> list[Any]:
        asked = [dnd.submit(f"word {i}", "upper" if i % 2 else None, max_new_tokens=5) for i in range(20)]
        await asyncio.gather(*(asyncio.wrap_future(s.future) for s in asked))
        return [s.completion(0) for s in asked]

    got = asyncio.run(all_of_them())
    assert [c.text for c in got] == [
        dnd.complete(f"word {i}", "upper" if i % 2 else None, max_new_tokens=5).text for i in range(20)
    ]


def test_what_the_context_leaves_is_all_that_one_may_take_where_it_may_be_clipped(dnd: DnD) -> None:
    room = dnd.engine.context_tokens
    with pytest.raises(InputError, match="fit"):
        dnd.submit("hi", max_new_tokens=room)
    clipped = dnd.submit("hi", may_clip=True, max_new_tokens=room).completion(60)
    assert sum(clipped.usage.values()) <= room
    with pytest.raises(InputError, match="fit"):
        dnd.submit("word " * room, may_clip=True, max_new_tokens=1)


def test_a_deadline_of_nothing_ends_it_at_once(world: World) -> None:
    got = world.session().submit("hi", deadline_s=0, max_new_tokens=50).completion(30)
    assert (got.finish_reason, got.text) == ("cancelled", "")


@pytest.mark.parametrize(
    "bad", [{"emit": 3}, {"may_clip": 1}, {"deadline_s": -1}, {"deadline_s": "soon"}, {"deadline_s": float("nan")}]
)
def test_an_argument_that_is_none_is_refused_and_nothing_runs(dnd: DnD, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        dnd.submit("hi", "upper", **bad)
    assert not generating()


def test_an_unknown_adapter_is_the_callers_error(dnd: DnD) -> None:
    with pytest.raises(AdapterNotFoundError):
        dnd.submit("hi", "nobody")


def test_an_error_of_whoever_is_told_is_the_requests(dnd: DnD) -> None:
    def broken(piece: str) -> None:
        raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError, match="the reader broke"):
        dnd.submit("hi", emit=broken, max_new_tokens=5).completion(30)
    assert dnd.complete("hi", max_new_tokens=2).usage["completion_tokens"] > 0


def test_a_backend_says_how_many_it_answers(dnd: DnD) -> None:
    seen = list[int]()
    future = dnd.engine.submit(
        CompletionRequest("hi", options=SamplingOptions(max_new_tokens=4)), lambda _: seen.append(dnd.engine.n_running)
    )
    future.result(30)
    assert seen and set(seen) == {1} and dnd.engine.n_waiting == 0
    assert soon(lambda: dnd.engine.n_running == 0)
    assert dnd.engine.resident() == [dnd.store.get("upper").id]


def test_adapt_tells_its_steps_as_they_begin(world: World) -> None:
    dnd, steps = world.session(), list[str]()
    made = dnd.adapt(prompts_of("upper"), progress=steps.append)
    assert steps == ["route", "encode", "route", "generate", "validate", "store", "swap"]
    assert all(made.timings_s[step] > 0 for step in steps)

    def stop(step: str) -> None:
        if step == "store":
            raise InputError("stopped")

    with pytest.raises(DndError, match="stopped"):
        dnd.adapt(prompts_of("digits"), progress=stop)
    assert [a.name for a in dnd.store.ls()] == [made.adapter and made.adapter.name]
    with pytest.raises(ConfigError, match="progress"):
        dnd.adapt(prompts_of("digits"), progress=3)  # type: ignore[arg-type]
