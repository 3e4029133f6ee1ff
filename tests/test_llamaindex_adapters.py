"""`DnDLLM` chooses adapters per call, and learns tasks from the requests it sees."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest
from llamaindex_parts import METHODS, ScriptedDnD, ask, call
from paced import put_adapter, wait_until
from test_observing_observer import tell_apart
from tiny_world import World, prompts_of

from dnd_sdk.errors import StorageError
from dnd_sdk.integrations.llamaindex import DnDLLM
from dnd_sdk.observing.prompt_stream import StreamSettings
from dnd_sdk.session import DnD

SHORT = {"max_tokens": 4}


@pytest.fixture
def observed(world: World, monkeypatch: pytest.MonkeyPatch) -> DnD:
    """A session that adapts to a task after four of its prompts."""
    return tell_apart(world.session(stream=StreamSettings(min_prompts=4)), monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_fixed_named_routed_and_none(world: World, method: str) -> None:
    dnd = world.session(reuse=0.98)
    made = dnd.adapt(prompts_of("lower"), name="cats").adapter
    put_adapter(dnd, "other", seed=1)
    like = "the cat 7 sat on it"
    auto = DnDLLM(dnd, max_new_tokens=4)
    assert auto.adapter == "auto"
    assert ask(auto, method, like).raw["dnd"] == {"adapter": "cats", "decision": "reuse"}
    assert ask(auto, method, "0123456789 ** 99 !!").raw["dnd"] == {"adapter": None, "decision": "base"}
    assert ask(auto, method, like, adapter="other").raw["dnd"]["adapter"] == "other"
    assert ask(auto, method, "?", adapter=made).raw["dnd"]["adapter"] == "cats"
    assert ask(auto, method, like, adapter=None).raw["dnd"]["adapter"] is None
    fixed = DnDLLM(dnd, adapter=made, max_new_tokens=4)
    assert ask(fixed, method, "0123456789").raw["dnd"]["adapter"] == "cats"
    assert ask(fixed, method, "0123456789", adapter="auto").raw["dnd"]["adapter"] is None
    assert fixed.adapter == "cats", "a call must not change the settings"


def test_a_request_without_user_text_is_answered_by_the_base() -> None:
    scripted = ScriptedDnD("a", "b")
    llm = DnDLLM(scripted)
    llm.complete(" \n")
    llm.chat([])
    assert [adapter for _, adapter, _ in scripted.chats] == [None, None]


def test_two_adapters_at_once_never_mix(world: World) -> None:
    dnd = world.session()
    names: list[str | None] = ["a", "b", None]
    put_adapter(dnd, "a", seed=1)
    put_adapter(dnd, "b", seed=2)
    llm = DnDLLM(dnd, max_new_tokens=10)
    questions = [f"question {i}" for i in range(4)]
    expected = {(q, n): dnd.complete(q, adapter=n, max_new_tokens=10).text for q in questions for n in names}
    assert all(len({expected[q, n] for n in names}) == 3 for q in questions), "the adapters must differ"

    async def together() -> list[bool]:
        jobs = [(q, n, m) for q in questions for n in names for m in ("acomplete", "astream_chat")]

        async def one(question: str, name: str | None, method: str) -> bool:
            got = await call(llm, method, question, adapter=name)
            last = got if method == "acomplete" else [item async for item in got][-1]
            text = last.text if method == "acomplete" else last.message.content
            return (text, last.raw["dnd"]["adapter"]) == (expected[question, name], name)

        return await asyncio.gather(*(one(*j) for j in jobs))

    results = asyncio.run(together())
    assert len(results) == 24 and all(results)


@pytest.mark.parametrize("method", METHODS)
def test_observed_requests_are_adapted_to_on_the_fly(observed: DnD, method: str) -> None:
    llm = DnDLLM(observed, observe=True, max_new_tokens=4)
    mixed = [p for two in zip(prompts_of("upper", 6), prompts_of("digits", 6), strict=True) for p in two]
    told = [ask(llm, method, p).raw["dnd"] for p in mixed]
    names = [t["adapter"] for t in told]
    assert names[:6] == [None] * 6 and len({a.name for a in observed.store.ls()}) == 2
    assert names[6:] == names[6:8] * 3 and len({*names[6:8], None}) == 3
    assert told[6]["decision"] == "reuse"


def test_only_routed_requests_are_observed(observed: DnD) -> None:
    put_adapter(observed, "mine", seed=1)
    llm = DnDLLM(observed, observe=True)
    for p in prompts_of("upper", 6):
        ask(llm, "complete", p, adapter="mine", **SHORT)
        ask(llm, "complete", p, adapter=None, **SHORT)
        ask(DnDLLM(observed), "complete", p, **SHORT)
    assert [a.name for a in observed.store.ls()] == ["mine"]


@pytest.mark.parametrize("method", ["complete", "astream_chat"])
@pytest.mark.parametrize("error", [StorageError("disk full"), RuntimeError("out of memory")])
def test_an_adaptation_that_fails_does_not_fail_the_answer(
    observed: DnD, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, method: str
) -> None:
    llm = DnDLLM(observed, observe=True)
    prompts = prompts_of("upper", 8)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr(observed.store, "put", lambda *a, **k: (_ for _ in ()).throw(error))
        told = [ask(llm, method, p, **SHORT) for p in prompts[:5]]
    assert [t.raw["dnd"]["adapter"] for t in told] == [None] * 5 and all(t.text for t in told)
    assert caplog.text.count(f"adapting failed, the base answers: {error}") == 2  # each further prompt tries again
    assert ask(llm, method, prompts[6], **SHORT).raw["dnd"]["adapter"] is not None


def test_an_adapter_that_went_away_is_made_again(observed: DnD) -> None:
    llm = DnDLLM(observed, observe=True)
    prompts = prompts_of("upper", 6)
    name = [ask(llm, "complete", p, **SHORT) for p in prompts[:5]][-1].raw["dnd"]["adapter"]
    observed.engine.bank.evict(observed.store.get(name).id)
    observed.store.rm(name)
    assert ask(llm, "complete", prompts[5], **SHORT).raw["dnd"]["adapter"] in {a.name for a in observed.store.ls()}


def test_while_one_request_adapts_the_loop_runs_and_others_are_answered(
    observed: DnD, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = DnDLLM(observed, observe=True)
    adapting, go_on = threading.Event(), threading.Event()
    real = observed.adapt

    def slow(*args: Any, **kwargs: Any) -> Any:
        adapting.set()
        assert go_on.wait(10), "the event loop is blocked"
        return real(*args, **kwargs)

    monkeypatch.setattr(observed, "adapt", slow)
    prompts = prompts_of("upper", 8)

    async def run() -> tuple[list[Any], Any]:
        for p in prompts[:3]:
            await llm.acomplete(p, **SHORT)
        waiting = asyncio.create_task(llm.acomplete(prompts[3], **SHORT))
        while not adapting.is_set():
            await asyncio.sleep(0)
        others = await asyncio.gather(*(llm.acomplete(p, **SHORT) for p in prompts[4:]))
        assert not waiting.done()
        go_on.set()
        return others, await waiting

    others, last = asyncio.run(run())
    assert [o.raw["dnd"]["adapter"] for o in others] == [None] * 4 and all(o.text for o in others)
    assert last.raw["dnd"]["adapter"] is not None
    assert len(observed.store.ls()) == 1


def test_an_adaptation_outlives_the_request_that_set_it_off(observed: DnD, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = DnDLLM(observed, observe=True)
    adapting, go_on = threading.Event(), threading.Event()
    real = observed.adapt

    def slow(*args: Any, **kwargs: Any) -> Any:
        adapting.set()
        assert go_on.wait(10)
        return real(*args, **kwargs)

    monkeypatch.setattr(observed, "adapt", slow)
    prompts = prompts_of("upper", 5)

    async def run() -> None:
        for p in prompts[:3]:
            await llm.acomplete(p, **SHORT)
        waiting = asyncio.create_task(llm.acomplete(prompts[3], **SHORT))
        while not adapting.is_set():
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()

    asyncio.run(run())
    stream = observed._observer.stream
    wait_until(lambda: any(stream.choice(c) for c in stream.sizes()), "the adaptation was lost")
    assert llm.complete(prompts[4], **SHORT).raw["dnd"]["adapter"] is not None
