"""What every backend keeps to: the engine on a tiny base, the fake one and vLLM's two (stubs), held to one contract."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from engine_parts import generating, soon, strong, tiny_base, tiny_layout
from fake_vllm import FakeVllm
from stub_vllm import StubVllm, stub_vllm, written

from dnd_sdk.adapters import Adapter
from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import (
    Backend,
    CompletionRequest,
    Engine,
    FakeBackend,
    Generation,
    LocalVllmBackend,
    VllmBackend,
    local_engine,
)
from dnd_sdk.errors import AdapterNotFoundError, ConfigError, InputError

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TWELVE = "one two three four five six seven eight nine ten eleven twelve"


class Case(NamedTuple):
    """A backend, and how to make another whose answers take their time."""

    backend: Backend
    slow: Callable[[], Backend]


def stored(i: int) -> Adapter:
    """The `i`-th adapter, as a store would describe it."""
    return Adapter(f"adapter-{i}", f"{i:064x}"[::-1], Path("nowhere"), "trained", "2026-01-01T00:00:00+00:00", "f", "d")


def engine_case() -> Case:
    base = tiny_base()
    with torch.no_grad():  # never ends an answer by itself
        base.model.get_output_embeddings().weight[base.tokenizer.eos_token_id] = 0.0
    engine = Engine(base, tiny_layout(base), n_slots=3)
    return Case(engine, lambda: engine)


def fake_case() -> Case:
    layout = tiny_layout(tiny_base())

    def drawl(request: CompletionRequest) -> Iterator[str]:
        for i in range(400):
            time.sleep(0.002)
            yield f"word{i} "

    fake = FakeBackend(layout, context_tokens=512, shows_tools=False)
    return Case(fake, lambda: FakeBackend(layout, drawl, context_tokens=512))


def vllm_case(make: Callable[[StubVllm], Backend], end: ExitStack) -> Case:
    quick = end.enter_context(stub_vllm(context=512, tools=False))
    slow = end.enter_context(stub_vllm(context=512))
    slow.delay_s, slow.words = 0.002, [f"word{i} " for i in range(400)]
    return Case(make(quick), lambda: make(slow))


@pytest.fixture(params=["engine", "fake", "vllm", "vllm-local"])
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    layout, served = tiny_layout(tiny_base()), tmp_path / "served"

    def local(stub: StubVllm) -> Backend:
        FakeVllm(stub).install(monkeypatch)
        return LocalVllmBackend("base", layout, served)

    with ExitStack() as end:
        if request.param == "vllm":
            yield vllm_case(lambda stub: VllmBackend(stub.url, layout, served), end)
        elif request.param == "vllm-local":
            yield vllm_case(local, end)
        else:
            yield engine_case() if request.param == "engine" else fake_case()


@pytest.fixture
def backend(case: Case) -> Backend:
    """With two adapters held."""
    for i in range(2):
        hold(case.backend, i)
    return case.backend


def hold(backend: Backend, i: int) -> Adapter:
    adapter = stored(i)
    if isinstance(backend, VllmBackend):
        adapter = replace(adapter, path=written(backend.served / "stored", adapter, backend.layout))
    backend.hold(adapter, lambda: strong(backend.layout, i))
    return adapter


def ask(backend: Backend, adapter: int | None = None, chat: str = TWELVE, **options: object) -> CompletionRequest:
    how = SamplingOptions(**{"max_new_tokens": 6} | options)
    return CompletionRequest(chat, None if adapter is None else stored(adapter).id, how)


def answer(backend: Backend, request: CompletionRequest) -> Generation:
    return backend.complete([request])[0]


def test_it_says_what_it_is(backend: Backend) -> None:
    assert backend.layout == tiny_layout(tiny_base()) and backend.context_tokens == 512
    assert backend.has_chat_template and not backend.shows_tools


def test_a_list_is_answered_in_order_as_one_by_one(backend: Backend) -> None:
    requests = [
        ask(backend, (None, 0, 1)[i % 3], f"{TWELVE} {i}", max_new_tokens=1 + i, stop=("e",) if i % 4 == 3 else ())
        for i in range(9)
    ]
    answers = backend.complete(requests)
    assert answers == [answer(backend, r) for r in requests]
    assert len({a.text for a in answers}) > 5 and backend.complete([]) == []


def test_the_answer_is_the_adapters_own(backend: Backend) -> None:
    texts = [answer(backend, ask(backend, a)).text for a in (None, 0, 1)]
    assert len(set(texts)) == 3 and texts == [answer(backend, ask(backend, a)).text for a in (None, 0, 1)]


def test_a_stream_is_the_answer_in_pieces(backend: Backend) -> None:
    for request in (ask(backend, 0), ask(backend, None, stop=("o",)), ask(backend, 1, max_new_tokens=1)):
        stream = backend.stream(request)
        whole = answer(backend, request)
        assert "".join(stream) == whole.text and stream.generation == whole
    assert len(list(backend.stream(ask(backend, 0)))) > 1


def test_limits_and_stops_end_an_answer_and_say_so(backend: Backend) -> None:
    whole = answer(backend, ask(backend, 0))
    assert (whole.completion_tokens, whole.finish_reason) == (6, "length") and whole.prompt_tokens > 0
    cut = answer(backend, ask(backend, 0, stop=("never", whole.text[2:4])))
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(whole.text[2:4])], "stop")


def test_who_is_not_held_cannot_be_asked(backend: Backend) -> None:
    for call in (lambda r: backend.complete([ask(backend, 0), r]), backend.stream):
        with pytest.raises(AdapterNotFoundError):
            call(ask(backend, 2))
    first = answer(backend, ask(backend, 0))
    hold(backend, 0)
    assert answer(backend, ask(backend, 0)) == first
    backend.forget(stored(0).id)
    backend.forget(stored(0).id)
    with pytest.raises(AdapterNotFoundError):
        answer(backend, ask(backend, 0))
    hold(backend, 0)
    assert answer(backend, ask(backend, 0)) == first


def test_close_frees_the_adapters_and_no_more(backend: Backend) -> None:
    first = answer(backend, ask(backend, 0))
    backend.close()
    with pytest.raises(AdapterNotFoundError):
        answer(backend, ask(backend, 1))
    hold(backend, 0)
    assert answer(backend, ask(backend, 0)) == first


def test_a_cancel_before_the_start_ends_its_own_request(backend: Backend) -> None:
    cancel = threading.Event()
    cancel.set()
    ended = CompletionRequest(TWELVE, stored(0).id, SamplingOptions(max_new_tokens=6), cancel=cancel)
    got, other = backend.complete([ended, ask(backend, 1)])
    assert (got.text, got.completion_tokens, got.finish_reason) == ("", 0, "cancelled")
    assert other == answer(backend, ask(backend, 1))
    stream = backend.stream(ended)
    assert list(stream) == [] and stream.generation == got


def test_a_cancel_ends_a_running_stream(case: Case) -> None:
    backend, cancel = case.slow(), threading.Event()
    stream = backend.stream(CompletionRequest("hi", None, SamplingOptions(max_new_tokens=300), cancel=cancel))
    first = next(stream)
    cancel.set()
    rest = list(stream)
    assert stream.generation is not None and stream.generation.finish_reason == "cancelled"
    assert stream.generation.text == "".join([first, *rest]) and stream.generation.completion_tokens < 300


def test_a_closed_stream_is_over(case: Case) -> None:
    with case.slow().stream(CompletionRequest("hi", None, SamplingOptions(max_new_tokens=300))) as stream:
        next(stream)
    assert list(stream) == []
    assert soon(lambda: not generating())


@pytest.mark.parametrize(
    ("chat", "tools", "error", "words"),
    [
        ([], None, InputError, "no messages"),
        ([{"role": "user"}], None, InputError, "message 0"),
        ("x " * 600, None, InputError, "at most"),
        ("hi", "x", InputError, "tools must be"),
        ("hi", [ADD], ConfigError, "does not render tools"),
    ],
)
def test_a_bad_request_is_refused_before_any_is_answered(
    backend: Backend, chat: object, tools: object, error: type[Exception], words: str
) -> None:
    bad = CompletionRequest(chat, None, SamplingOptions(max_new_tokens=6), tools)
    for call in (lambda r: backend.complete([ask(backend), r]), backend.stream):
        with pytest.raises(error, match=words):
            call(bad)
    assert getattr(backend, "requests", []) == []


def test_only_a_base_in_this_process_can_be_looked_into() -> None:
    engine, fake = engine_case().backend, fake_case().backend
    assert local_engine(engine, "a test") is engine is engine.local and fake.local is None
    with pytest.raises(ConfigError, match="a test needs the base in this process, it is served by FakeBackend"):
        local_engine(fake, "a test")
