"""Streams: the same text in pieces, errors where the consumer is, nothing left behind."""

from __future__ import annotations

import gc
import threading
import time

import pytest
from engine_parts import PROMPTS, adapted_engine, ask, idle, soon, strong

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine
from dnd_sdk.engine.text import RowText
from dnd_sdk.errors import AdapterNotFoundError, InputError

LONG = SamplingOptions(max_new_tokens=400)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return adapted_engine(layers=1, n_slots=2)


@pytest.mark.parametrize("adapter", [None, "a", "b"])
def test_pieces_join_to_the_complete_text(engine: Engine, adapter: str | None) -> None:
    options = SamplingOptions(max_new_tokens=24)
    for prompt in PROMPTS[:3]:
        stream = engine.stream(CompletionRequest(prompt, adapter, options))
        pieces = list(stream)
        whole = ask(engine, prompt, adapter, options)
        assert len(pieces) > 1 and "".join(pieces) == whole.text and stream.generation == whole


def test_stop_strings_never_show(engine: Engine) -> None:
    whole = ask(engine, "hi", "a", SamplingOptions(max_new_tokens=24)).text
    options = SamplingOptions(max_new_tokens=24, stop=(whole[5:8],))
    assert "".join(engine.stream(CompletionRequest("hi", "a", options))) == ask(engine, "hi", "a", options).text
    assert len(ask(engine, "hi", "a", options).text) < len(whole)


def test_cancel_ends_the_stream_and_says_so(engine: Engine) -> None:
    cancel = threading.Event()
    stream = engine.stream(CompletionRequest("hi", "a", LONG, cancel=cancel))
    assert next(stream)
    cancel.set()
    list(stream)
    assert stream.generation is not None and stream.generation.finish_reason == "cancelled"
    assert stream.generation.completion_tokens < 400 and soon(lambda: idle(engine))


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens that streams read, each of which takes a while."""
    tokens: list[int] = []
    feed = RowText.feed

    def slow(self: RowText, new: list[int]) -> bool:
        tokens.extend(new)
        time.sleep(0.005)
        return feed(self, new)

    monkeypatch.setattr(RowText, "feed", slow)
    return tokens


def test_close_stops_the_work_and_frees_the_lease(engine: Engine, fed: list[int]) -> None:
    with engine.stream(CompletionRequest("hi", "a", LONG)) as stream:
        next(stream)
    assert list(stream) == [] and soon(lambda: idle(engine)) and len(fed) < 300


def test_a_dropped_stream_ends_even_unread(engine: Engine, fed: list[int]) -> None:
    stream = engine.stream(CompletionRequest("hi", "a", LONG))
    assert soon(lambda: fed)
    del stream
    gc.collect()
    assert soon(lambda: idle(engine)) and len(fed) < 300


def test_the_adapter_stays_until_the_stream_ends(engine: Engine) -> None:
    one = Engine(engine.base, engine.layout, n_slots=1, fetch=lambda name: strong(engine.layout, "ab".index(name)))
    options = SamplingOptions(max_new_tokens=30)
    stream = one.stream(CompletionRequest("hi", "a", options))
    assert ask(one, "x", "b", options) == ask(engine, "x", "b", options)  # waits for the slot
    assert "".join(stream) == ask(engine, "hi", "a", options).text


def test_others_get_answers_while_a_stream_runs(engine: Engine) -> None:
    stream = engine.stream(CompletionRequest("hi", "a", LONG))
    next(stream)
    ask(engine, "x", "b", SamplingOptions(max_new_tokens=2))
    assert not engine._scheduler.is_idle
    stream.close()
    assert soon(lambda: idle(engine))


def test_errors_of_the_model_reach_the_consumer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("the model broke")

    with monkeypatch.context() as patch:
        patch.setattr(engine.base.model, "forward", fail)
        stream = engine.stream(CompletionRequest("hi", "a", LONG))
        with pytest.raises(RuntimeError, match="the model broke"):
            next(stream)
        assert list(stream) == []
    assert soon(lambda: idle(engine))


def test_bad_calls_raise_at_once(engine: Engine) -> None:
    with pytest.raises(AdapterNotFoundError):
        engine.stream(CompletionRequest("hi", "zzz"))
    with pytest.raises(InputError, match="at most"):
        engine.stream(CompletionRequest("x" * 600, "a"))
    assert idle(engine)


def test_a_thread_that_cannot_start_frees_the_lease(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", fail)
        with pytest.raises(RuntimeError, match="can't start") as caught:
            engine.stream(CompletionRequest("hi", "a"))
    assert caught.tb is not None and idle(engine)  # while the traceback still holds the frames
