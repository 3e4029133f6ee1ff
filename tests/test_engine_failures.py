"""What goes wrong in one request is that request's error; the others get the answers they would have got."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_parts import PROMPTS, ask, ask_all, idle, soon, strong, tiny_base, tiny_layout

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine, Generation
from dnd_sdk.engine.constraint import Constraint
from dnd_sdk.engine.kv_cache import Lane
from dnd_sdk.engine.row import Row
from dnd_sdk.engine.separate import SeparateForward
from dnd_sdk.errors import AdapterNotFoundError, BankFullError, DndError

OPTIONS = SamplingOptions(max_new_tokens=12)
NAMES = ("a", "b", "c")


def make(*, separate: bool = False, **settings: Any) -> Engine:
    """An engine that fetches the adapters of `NAMES`."""
    base = tiny_base()
    layout = tiny_layout(base)

    def fetch(name: str) -> torch.Tensor:
        if name not in NAMES:
            raise AdapterNotFoundError(f"no {name}")
        return strong(layout, NAMES.index(name))

    made = Engine(base, layout, n_slots=4, fetch=fetch, **settings)
    if separate:
        made._scheduler._forward = SeparateForward(base.model, made.bank)
    return made


def outcomes(futures: list[Future[Generation]]) -> list[Any]:
    return [type(e) if (e := future.exception(30)) else future.result() for future in futures]


def submitted(engine: Engine, adapters: list[str | None], **options: Any) -> list[Future[Generation]]:
    """Requests that begin in one step."""
    with engine.turns.take():
        return [
            engine.submit(CompletionRequest(PROMPTS[i % 5], a, SamplingOptions(max_new_tokens=12, **options)))
            for i, a in enumerate(adapters)
        ]


ADAPTERS: list[str | None] = ["a", "b", None, "c", "a"]


@pytest.fixture(params=[False, True], ids=["flat", "separate"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return make(separate=request.param)


def expected(engine: Engine) -> list[Any]:
    return [ask(engine, PROMPTS[i % 5], a, OPTIONS) for i, a in enumerate(ADAPTERS)]


def test_an_adapter_that_cannot_be_fetched(engine: Engine) -> None:
    want = expected(engine)
    got = outcomes(submitted(engine, [*ADAPTERS, "zzz"]))
    assert got == [*want, AdapterNotFoundError] and soon(lambda: idle(engine))


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit])
def test_a_forward_that_fails_for_one_adapter_only(
    engine: Engine, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = expected(engine)
    run = engine._scheduler._forward.run

    def broken(writing: Any, reading: Any) -> torch.Tensor:
        row = engine.bank._table._slots["b"].row if "b" in engine.bank.resident() else -1
        if any(r.adapter_row == row for r in writing):
            raise error("the model broke")
        return run(writing, reading)

    monkeypatch.setattr(engine._scheduler._forward, "run", broken)
    got = outcomes(submitted(engine, ADAPTERS))
    assert got == [error if a == "b" else g for a, g in zip(ADAPTERS, want, strict=True)]
    assert soon(lambda: idle(engine)) and ask(engine, "hi", "a", OPTIONS).text == want[0].text


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("at", range(2, 20, 3))
def test_a_model_that_fails_half_way_through_one_rows_turn(
    separate: bool, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(separate=separate)
    want = expected(engine)
    forward, n = engine.base.model.forward, [0]

    def once(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        n[0] += 1
        if n[0] == at:
            raise RuntimeError("once")
        return out

    monkeypatch.setattr(engine.base.model, "forward", once)
    got = outcomes(submitted(engine, ADAPTERS))
    # a step of several is run again row by row; one of a single row fails
    assert sum(g is RuntimeError for g in got) <= 1
    assert [g for g in got if g is not RuntimeError] == [
        w for g, w in zip(got, want, strict=True) if g is not RuntimeError
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_always_fails(
    engine: Engine, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = expected(engine)

    def broken(*_: Any, **__: Any) -> Any:
        raise error("the model broke")

    with monkeypatch.context() as patch:
        patch.setattr(engine.base.model, "forward", broken)
        assert outcomes(submitted(engine, ADAPTERS)) == [error] * 5
        with pytest.raises(error):
            ask_all(engine, ["hi"] * 3, ["a"] * 3, OPTIONS)
    assert soon(lambda: idle(engine)) and expected(engine) == want


def test_errors_around_the_model_end_no_thread(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    want = expected(engine)
    for name in ("must_wait", "start", "ordered"):
        with monkeypatch.context() as patch:
            patch.setattr(engine._scheduler._forward, name, lambda *_: 1 / 0)
            assert outcomes(submitted(engine, ADAPTERS)) == [ZeroDivisionError] * 5
        assert soon(lambda: idle(engine)) and outcomes(submitted(engine, ADAPTERS)) == want
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "_pieces", lambda *_: 1 / 0)
        assert outcomes(submitted(engine, ADAPTERS)) == [ZeroDivisionError] * 5
    assert soon(lambda: idle(engine)) and outcomes(submitted(engine, ADAPTERS)) == want


def test_text_that_cannot_be_made_for_one_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    want = expected(engine)
    finish, take = Row.finish, Row.take

    def broken_end(self: Row) -> None:
        if self.request.adapter_id == "b":
            raise UnicodeError
        finish(self)

    def broken_token(self: Row, token: int) -> None:
        if self.request.adapter_id == "c" and len(self._tokens) == 3:
            raise UnicodeError
        take(self, token)

    monkeypatch.setattr(Row, "finish", broken_end)
    monkeypatch.setattr(Row, "take", broken_token)
    got = outcomes(submitted(engine, ADAPTERS))
    assert got == [UnicodeError if a in ("b", "c") else g for a, g in zip(ADAPTERS, want, strict=True)]
    assert soon(lambda: idle(engine))


def test_a_callback_that_raises_ends_nothing(engine: Engine) -> None:
    want = expected(engine)

    def leave(_: Any) -> None:
        raise SystemExit

    with engine.turns.take():
        first = engine.submit(CompletionRequest("hi", "a", OPTIONS))
        first.add_done_callback(leave)
        others = submitted_now(engine)
    assert outcomes([first, *others]) == [want[0], *want] and soon(lambda: idle(engine))


def submitted_now(engine: Engine) -> list[Future[Generation]]:
    return [engine.submit(CompletionRequest(PROMPTS[i], a, OPTIONS)) for i, a in enumerate(ADAPTERS)]


def test_a_consumer_that_raises(engine: Engine) -> None:
    want = expected(engine)
    stream = engine.stream(CompletionRequest("hi", "a", OPTIONS))
    with pytest.raises(ZeroDivisionError):
        for _ in stream:
            1 / 0  # noqa: B018
    stream.close()
    assert expected(engine) == want and soon(lambda: idle(engine))


def test_a_schema_that_fails_mid_way(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    want = expected(engine)
    accept, n = Constraint.accept, [0]

    def broken(self: Constraint, token: int) -> None:
        n[0] += 1
        if n[0] == 3:
            raise DndError("too much work")
        accept(self, token)

    monkeypatch.setattr(Constraint, "accept", broken)
    held = SamplingOptions(max_new_tokens=12, schema='{"type": "object", "properties": {"x": {"type": "string"}}}')
    with engine.turns.take():
        failing = engine.submit(CompletionRequest("hi", "a", held))
        others = submitted_now(engine)
    assert outcomes([failing, *others]) == [DndError, *want] and soon(lambda: idle(engine))


@pytest.mark.parametrize("length", [256, 512])
def test_no_memory_for_a_lane(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever needs it fails; those that have their place go on, the new ones find theirs later."""
    engine = make()
    options = SamplingOptions(max_new_tokens=100)
    prompts = ["x" * 200, "y" * 190, "z", "w"]
    adapters: list[str | None] = ["a", "b", None, "c"]
    want = ask_all(engine, prompts, adapters, options)
    grow, init = Lane._grow, Lane.__init__

    def no_growth(self: Lane[Any], n_rows: int) -> None:
        if self.length == length:
            raise MemoryError
        grow(self, n_rows)

    def no_lane(self: Lane[Any], shape: Any, size: int) -> None:
        if size == length == 512:
            raise MemoryError
        init(self, shape, size)

    monkeypatch.setattr(Lane, "_grow", no_growth)
    monkeypatch.setattr(Lane, "__init__", no_lane)
    with engine.turns.take():
        futures = [engine.submit(CompletionRequest(p, a, options)) for p, a in zip(prompts, adapters, strict=True)]
    got = outcomes(futures)
    assert MemoryError in got and all(g in (MemoryError, w) for g, w in zip(got, want, strict=True))
    assert (got[2:] == want[2:]) if length == 512 else any(isinstance(g, Generation) for g in got)
    monkeypatch.undo()
    assert soon(lambda: idle(engine)) and ask_all(engine, prompts, adapters, options) == want


def test_values_that_are_not_finite_stay_with_their_row() -> None:
    engine = make()
    engine.bank.load("bad", torch.full((engine.layout.n_parameters,), 1e25))
    want = expected(engine)
    long = SamplingOptions(max_new_tokens=200)
    beside = engine.stream(CompletionRequest("hold the lane", None, long))
    next(beside)
    for _ in range(3):
        bad = submitted(engine, ["bad", "bad", "bad"], repetition_penalty=1.5)
        assert outcomes(submitted(engine, ADAPTERS)) == want
        outcomes(bad)
        assert outcomes(submitted(engine, ADAPTERS)) == want
    assert beside.generation is None
    beside.close()


@pytest.mark.parametrize("other", ["evict", "close", "lru"])
def test_no_head_of_old_weights_is_used_for_new_ones(other: str) -> None:
    """The same id, other weights: whatever was read under the old ones is not the new ones'."""
    base = tiny_base()
    layout = tiny_layout(base)
    weights = {"a": strong(layout, 0), "b": strong(layout, 1)}
    # nothing that is kept may be used: what lost its slot was removed and stored anew
    engine = Engine(base, layout, n_slots=1, fetch=lambda name: weights[name], is_stored=lambda _: False)
    head = "The same long head of many prompts. "
    prompts = [head + end for end in ("one", "two", "three", "four")]

    def answers() -> list[str]:
        return [g.text for g in ask_all(engine, prompts, ["a"] * 4, OPTIONS)]

    old = answers()
    assert ask(engine, prompts[0], "a", OPTIONS).reused_tokens > 16
    for seed in range(2, 6):
        fresh = Engine(base, layout, n_slots=1, fetch=lambda _, seed=seed: strong(layout, seed))
        weights["a"] = strong(layout, seed)
        if other == "evict":
            engine.forget("a")
        elif other == "close":
            engine.close()
        else:
            ask(engine, "x", "b", OPTIONS)
        first = ask(engine, prompts[0], "a", OPTIONS)
        assert first.reused_tokens == 0 and first.text == ask(fresh, prompts[0], "a", OPTIONS).text
        assert answers() == [g.text for g in ask_all(fresh, prompts, ["a"] * 4, OPTIONS)] != old


def test_close_and_forget_while_requests_run() -> None:
    engine = make()
    want = expected(engine)
    stop, refused = threading.Event(), [0]

    def disturb() -> None:
        while not stop.is_set():
            engine.close()
            for name in NAMES:
                try:
                    engine.forget(name)
                except BankFullError:
                    refused[0] += 1

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(8):
            assert outcomes(submitted(engine, ADAPTERS)) == want
    finally:
        stop.set()
        thread.join()
    assert refused[0] and soon(lambda: idle(engine))


ENDS: dict[str, str] = {
    "unread stream": "s = engine.stream(CompletionRequest('hi', 'a', LONG)); next(s)",
    "running": "f = [engine.submit(CompletionRequest('hi', a, LONG)) for a in 'ab' * 50]",
    "waiting for a slot": "lease = engine.bank.lease(['a', 'b']); lease.__enter__(); f = engine.submit("
    "CompletionRequest('hi', 'c', LONG))",
    "other thread": """
        out = []
        def work():
            time.sleep(0.5)
            out.append(engine.complete([CompletionRequest('hi', 'a', SHORT)])[0])
            print(out[0].finish_reason)
        threading.Thread(target=work).start()
    """,
    "interrupt": """
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        engine.complete([CompletionRequest('hi', a, LONG) for a in 'ab' * 50])
    """,
    "error": "f = engine.submit(CompletionRequest('hi', 'a', LONG)); raise SystemExit(3)",
}


@pytest.mark.parametrize("how", ENDS)
def test_the_interpreter_exits(how: str) -> None:
    script = f"""
    import os, signal, sys, threading, time
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from engine_parts import *
    SHORT, LONG = SamplingOptions(max_new_tokens=6), SamplingOptions(max_new_tokens=400)
    base = tiny_base(layers=1)
    layout = tiny_layout(base)
    engine = Engine(base, layout, n_slots=2, fetch=lambda name: strong(layout, ord(name)))
    forward = base.model.forward
    def slow(*args, **kwargs):
        time.sleep(0.05)
        return forward(*args, **kwargs)
    base.model.forward = slow
    """
    code = textwrap.dedent(script) + textwrap.dedent(ENDS[how])
    # a hundred requests of 400 steps of 50 ms would take minutes; the limit is what tells
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if how == "interrupt":
        # 1 where a package that is installed runs code of its own while the interpreter ends
        assert done.returncode in (1, 130, -2) and done.stderr.strip().endswith("KeyboardInterrupt")
    else:
        assert (done.returncode, done.stderr) == (3 if how == "error" else 0, "")
    assert done.stdout == ("length\n" if how == "other thread" else "")
