"""`VllmBackend` over a stub of vLLM's HTTP interface: what it asks, what becomes of errors, kills and restarts."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_parts import soon, tiny_base, tiny_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stub_vllm import StubVllm, stub_vllm, written

from dnd_sdk.adapters import Adapter
from dnd_sdk.chat import checked_schema, read_answer
from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Generation, VllmBackend, vllm_adapters
from dnd_sdk.engine import vllm as engine_vllm
from dnd_sdk.errors import (
    AdapterNotFoundError,
    BackendError,
    BankFullError,
    BusyError,
    ConfigError,
    ContextLengthError,
    DndError,
    InputError,
    LayoutMismatchError,
)

LAYOUT = tiny_layout(tiny_base())
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CHAT = "/v1/chat/completions"


@pytest.fixture
def stub() -> Iterator[StubVllm]:
    with stub_vllm() as running:
        yield running


@pytest.fixture
def backend(stub: StubVllm, tmp_path: Path) -> VllmBackend:
    return VllmBackend(stub.url, LAYOUT, tmp_path / "served", max_loaded=3)


def stored(root: Path, i: int, name: str | None = None) -> Adapter:
    """The `i`-th adapter, in a folder of its name."""
    name = name or f"adapter-{i}"
    adapter = Adapter(name, f"{i:x}".ljust(64, "a"), root / name, "trained", "2026-01-01T00:00:00+00:00", "f", "d")
    return replace(adapter, path=written(root, adapter, LAYOUT))


def hold(backend: VllmBackend, i: int) -> Adapter:
    adapter = stored(backend.served.parent / "store", i)
    backend.hold(adapter, lambda: None)  # type: ignore[arg-type, return-value]
    return adapter


def ask(adapter: Adapter | None = None, chat: Any = "hello there", **more: Any) -> CompletionRequest:
    options = {k: more.pop(k) for k in list(more) if k in SamplingOptions.__dataclass_fields__}
    return CompletionRequest(chat, None if adapter is None else adapter.id, SamplingOptions(**options), **more)


def answer(backend: VllmBackend, request: CompletionRequest) -> Generation:
    return backend.complete([request])[0]


def said_by(adapter: Adapter | None) -> str:
    return "base" if adapter is None else adapter.id[:20]


def test_it_says_what_the_server_is(backend: VllmBackend, stub: StubVllm) -> None:
    served = backend.served_base
    assert (served.name, served.root, served.version) == ("stub-base", "stub-base", "0.stub")
    assert backend.context_tokens == 4096 and backend.shows_tools and backend.has_chat_template
    assert backend.local is None and backend.url == stub.url and backend.token_ids("a") is None
    stub.tokens = lambda text: [len(text)]
    assert backend.token_ids("abc") == [3]


def test_every_option_is_said_in_vllms_words(backend: VllmBackend, stub: StubVllm) -> None:
    schema = checked_schema({"type": "object", "properties": {}, "additionalProperties": False})
    how = dict(max_new_tokens=5, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1)
    answer(backend, ask(**how, seed=-1, stop=("x", "y"), schema=schema, logprobs=2))
    [body] = stub.paths(CHAT)
    assert (body["max_tokens"], body["seed"]) == (5, 2**63 - 1) and body["stop"] == ["x", "y"]
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert body[name] == how[name]
    assert body["response_format"]["json_schema"]["schema"]["additionalProperties"] is False
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)
    answer(backend, ask())
    plain = stub.paths(CHAT)[1]
    assert not {"seed", "stop", "response_format", "logprobs", "tools"} & plain.keys()
    assert (plain["temperature"], plain["repetition_penalty"]) == (0.0, 1.0)  # not what the base's own file advises


def test_what_comes_back(backend: VllmBackend) -> None:
    got = answer(backend, ask(chat="one two three", max_new_tokens=3, logprobs=2))
    assert (got.text, got.finish_reason) == ("base: one two", "length")
    assert (got.prompt_tokens, got.completion_tokens) == (6, 3)
    assert got.logprobs is not None and [t.text for t in got.logprobs] == ["base:", " one", " two"]
    assert got.logprobs[0].logprob == -0.5 and got.logprobs[0].likeliest == (("t0", 0.0), ("t1", -1.0))
    assert answer(backend, ask()).logprobs is None


def test_tools_are_shown_and_calls_come_back_as_they_were_written(backend: VllmBackend, stub: StubVllm) -> None:
    stub.words = ['<tool_call>{"name": "add", ', '"arguments": {}}</tool_call>']
    text = answer(backend, ask(tools=[ADD])).text
    assert [c.name for c in read_answer(text, [ADD]).calls] == ["add"]
    body = stub.paths(CHAT)[0]
    assert (body["tools"], body["tool_choice"]) == ([ADD], "none")
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    answer(backend, ask(chat=[*chat, {"role": "tool", "content": "3"}], tools=[ADD]))
    [sent] = stub.paths(CHAT)[1]["messages"][1]["tool_calls"]
    assert sent["function"]["arguments"] == '{"a": 1}' and sent["id"]


def test_a_prompt_without_room_for_its_answer_is_refused_before_it_is_sent(
    backend: VllmBackend, stub: StubVllm
) -> None:
    long = ask(chat="x " * 4000, max_new_tokens=200)
    for call in (lambda: backend.complete([ask(), long]), lambda: backend.stream(long), lambda: backend.submit(long)):
        with pytest.raises(ContextLengthError, match=r"4003 tokens, at most 3896"):
            call()
    assert stub.paths(CHAT) == []
    clipped = answer(backend, replace(long, may_clip=True))
    assert clipped.completion_tokens == 93 and clipped.finish_reason == "length"
    with pytest.raises(ContextLengthError, match="at most"):
        answer(backend, ask(chat="x " * 5000, may_clip=True))


def test_a_server_that_refuses_what_does_not_fit_is_asked_without_a_limit(
    backend: VllmBackend, stub: StubVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = stub.refuse
    message = "max_tokens=9999 cannot be greater than max_model_len=4096. Please request fewer output tokens."
    body = {"error": {"message": message, "type": "BadRequestError", "code": 400}}

    class OnlyWithLimit:
        def __get__(self, *_: Any) -> Any:
            return (400, body) if "max_tokens" in stub.paths(CHAT)[-1] else plain

    monkeypatch.setattr(StubVllm, "refuse", OnlyWithLimit(), raising=False)
    del stub.__dict__["refuse"]
    assert answer(backend, ask(max_new_tokens=9999, may_clip=True)).text == "base: hello there"


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (400, {"error": {"message": "odd roles", "code": 400}}, InputError, "odd roles"),
        (400, {"object": "error", "message": "old words"}, InputError, "old words"),
        (401, {"error": "Unauthorized"}, BackendError, "refuses the key"),
        (404, {"error": {"message": "The model `x` does not exist.", "code": 404}}, BackendError, "does not exist"),
        (429, {"error": {"message": "slow down", "code": 429}}, BusyError, "slow down"),
        (503, "overloaded", BusyError, "overloaded"),
        (500, {"error": {"message": "EngineCore died", "code": 500}}, BackendError, "EngineCore died"),
        (502, "<html>bad gateway</html>", BackendError, "bad gateway"),
        (200, "not an event", BackendError, "ended in the middle"),
    ],
)
def test_what_the_server_refuses_is_an_error_of_ours(
    backend: VllmBackend, stub: StubVllm, status: int, body: Any, error: type[DndError], words: str
) -> None:
    stub.refuse = (status, body)
    with pytest.raises(error, match=words) as caught:
        answer(backend, ask())
    assert type(caught.value) is error
    with pytest.raises(error, match=words):
        backend.submit(ask()).result(10)


def test_an_error_in_the_middle_of_a_stream_is_raised(backend: VllmBackend, stub: StubVllm) -> None:
    stub.words, stub.error_at = ["one ", "two "], 1
    stream = backend.stream(ask())
    assert next(stream) == "one "
    with pytest.raises(BackendError, match="EngineCore"):
        next(stream)


def test_text_with_odd_line_ends_arrives_whole(backend: VllmBackend, stub: StubVllm) -> None:
    stub.words = ["a\u2028b ", "c\x85d ", "e\nf ", "\U0001f600 é"]
    assert answer(backend, ask()).text == "".join(stub.words)


def test_the_key_is_sent(stub: StubVllm, tmp_path: Path) -> None:
    stub.key = "secret"
    with pytest.raises(BackendError, match="refuses the key") as caught:
        VllmBackend(stub.url, LAYOUT, tmp_path)
    assert "DND_KEY" in str(caught.value.fix)
    backend = VllmBackend(f"{stub.url}/v1/", LAYOUT, tmp_path, key="secret")
    assert answer(backend, ask()).text == "base: hello there"


def test_nobody_there(stub: StubVllm, tmp_path: Path) -> None:
    stub.stop()
    with pytest.raises(BackendError, match="cannot be reached") as caught:
        VllmBackend(stub.url, LAYOUT, tmp_path)
    assert isinstance(caught.value, OSError) and caught.value.fix


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x", "http://", "http://user:pw@host", "http://x:0", "http://["]
)
def test_what_is_no_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="url must be like"):
        VllmBackend(url, LAYOUT, tmp_path)


def test_an_adapter_is_loaded_once_under_a_name_of_its_content(backend: VllmBackend, stub: StubVllm) -> None:
    adapter = stored(backend.served.parent / "store", 1)
    reads: list[int] = []

    def load() -> None:
        reads.append(1)
        time.sleep(0.05)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: backend.hold(adapter, load), range(16)))  # type: ignore[arg-type]
    name = f"dnd-{adapter.id[:16]}"
    assert stub.loads == [name] and len(reads) == 1 and backend.resident() == [adapter.id]
    assert stub.loaded[name] == str(backend.served / name)
    assert answer(backend, ask(adapter)).text.startswith(said_by(adapter))


def test_what_load_raises_is_raised_and_nothing_is_loaded(backend: VllmBackend, stub: StubVllm) -> None:
    adapter = stored(backend.served.parent / "store", 1)

    def damaged() -> Any:
        raise LayoutMismatchError("no")

    with pytest.raises(LayoutMismatchError, match="no"):
        backend.hold(adapter, damaged)
    assert stub.loads == [] and backend.resident() == []
    backend.hold(adapter, lambda: None)  # type: ignore[arg-type, return-value]
    assert backend.resident() == [adapter.id]


def test_the_server_finds_the_folder_elsewhere(stub: StubVllm, tmp_path: Path) -> None:
    backend = VllmBackend(stub.url, LAYOUT, tmp_path / "served", seen_at="/mnt/dnd/served")
    with pytest.raises(ConfigError, match="does not find /mnt/dnd/served/dnd-") as caught:
        hold(backend, 1)
    assert "shared" in str(caught.value.fix)
    stub.sees["/mnt/dnd"] = str(tmp_path)
    assert answer(backend, ask(hold(backend, 1))).text.startswith(said_by(stored(tmp_path / "x", 1)))


def test_the_servers_own_reason_is_told(backend: VllmBackend, stub: StubVllm) -> None:
    stub.max_rank = 2
    with pytest.raises(LayoutMismatchError, match=r"LoRA rank 4 is greater than max_lora_rank 2") as caught:
        hold(backend, 1)
    assert "--max-lora-rank" in str(caught.value.fix) and backend.resident() == []
    stub.runtime_loading = False
    with pytest.raises(ConfigError, match="takes no adapters at run time") as refused:
        hold(backend, 1)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in str(refused.value.fix)


def test_the_least_recently_used_gives_way(backend: VllmBackend, stub: StubVllm) -> None:
    a, b, c = (hold(backend, i) for i in (1, 2, 3))
    hold(backend, 1)
    d = hold(backend, 4)
    assert backend.resident() == [c.id, a.id, d.id] and set(stub.loaded) == {f"dnd-{x.id[:16]}" for x in (a, c, d)}
    with pytest.raises(AdapterNotFoundError, match="not held"):
        answer(backend, ask(b))
    backend.pin(c.id, True)
    hold(backend, 5)
    assert c.id in backend.resident() and a.id not in backend.resident()
    backend.pin(d.id, True)
    with pytest.raises(BankFullError, match="pinned"):
        backend.pin(f"{5:x}".ljust(64, "a"), True)
    with pytest.raises(AdapterNotFoundError):
        backend.pin(a.id, True)


def test_one_that_answers_does_not_give_way(
    backend: VllmBackend, stub: StubVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_adapters, "WAIT_S", 0.1)
    stub.gate = threading.Event()
    held = [hold(backend, i) for i in (1, 2, 3)]
    running = [backend.submit(ask(a)) for a in held]
    assert soon(lambda: backend.n_running == 3)
    with pytest.raises(BankFullError, match="in use or pinned"):
        hold(backend, 4)
    with pytest.raises(BankFullError, match="running request"):
        backend.forget(held[0].id)
    stub.gate.set()
    assert [f.result(10).text.split(":")[0] for f in running] == [said_by(a) for a in held]
    hold(backend, 4)
    assert backend.n_running == backend.n_waiting == 0


def test_holding_does_not_wait_for_a_place_who_asks_does(stub: StubVllm, tmp_path: Path) -> None:
    a, b = (stored(tmp_path / "store", i) for i in (1, 2))
    known = {x.id: x for x in (a, b)}
    backend = VllmBackend(stub.url, LAYOUT, tmp_path / "served", find=known.__getitem__, max_loaded=1)
    stub.gate = threading.Event()
    running = backend.submit(ask(a))
    assert soon(lambda: backend.n_running == 1)
    backend.hold(b, lambda: None)  # type: ignore[arg-type, return-value]
    assert backend.resident() == [a.id]
    waiting = backend.submit(ask(b))
    stub.gate.set()
    assert [f.result(10).text.split(":")[0] for f in (running, waiting)] == [said_by(a), said_by(b)]


def test_one_that_is_not_held_is_found(stub: StubVllm, tmp_path: Path) -> None:
    adapter = stored(tmp_path / "store", 1)
    known = {adapter.id: adapter}
    backend = VllmBackend(stub.url, LAYOUT, tmp_path / "served", find=known.__getitem__)
    assert answer(backend, ask(adapter)).text.startswith(said_by(adapter)) and backend.resident() == [adapter.id]


def test_a_server_started_anew_gets_the_adapter_again(backend: VllmBackend, stub: StubVllm) -> None:
    adapter = hold(backend, 1)
    stub.restart()
    with ThreadPoolExecutor(6) as threads:
        texts = list(threads.map(lambda _: answer(backend, ask(adapter)).text, range(6)))
    assert set(texts) == {f"{said_by(adapter)}: hello there"} and len(stub.loads) == 2


def test_a_pin_outlives_a_restart_of_the_server(backend: VllmBackend, stub: StubVllm) -> None:
    kept = hold(backend, 1)
    backend.pin(kept.id, True)
    stub.restart()
    answer(backend, ask(kept))
    for i in (2, 3, 4, 5):
        hold(backend, i)
    assert kept.id in backend.resident() and len(backend.resident()) == 3


def test_many_adapters_for_one_place_all_get_their_turn(stub: StubVllm, tmp_path: Path) -> None:
    adapters = [stored(tmp_path / "store", i) for i in range(1, 7)]
    known = {a.id: a for a in adapters}
    backend = VllmBackend(stub.url, LAYOUT, tmp_path / "served", find=known.__getitem__, max_loaded=1)
    wanted = adapters * 5
    answers = backend.complete([ask(a) for a in wanted])
    assert [g.text.split(":")[0] for g in answers] == [said_by(a) for a in wanted] and len(stub.loaded) == 1


def test_an_adapter_that_somebody_loaded_is_taken_as_it_is(
    backend: VllmBackend, stub: StubVllm, tmp_path: Path
) -> None:
    other = VllmBackend(stub.url, LAYOUT, tmp_path / "served")
    adapter = hold(other, 1)
    assert answer(backend, ask(hold(backend, 1))) == answer(other, ask(adapter))
    other.close()
    assert stub.loaded == {} and answer(backend, ask(adapter)).text.startswith(said_by(adapter))


def test_a_server_started_anew_with_another_base_is_refused(backend: VllmBackend, stub: StubVllm) -> None:
    adapter = hold(backend, 1)
    stub.restart()
    stub.name = stub.root = "other-base"
    for request in (ask(adapter), ask()):
        with pytest.raises(BackendError, match="now serves other-base, it was stub-base"):
            answer(backend, request)


def test_a_kill_in_the_middle_is_told_and_the_next_request_succeeds(backend: VllmBackend, stub: StubVllm) -> None:
    adapter = hold(backend, 1)
    stub.gate = threading.Event()
    stream, whole = backend.stream(ask(adapter)), backend.submit(ask(adapter))
    next(stream)
    assert soon(lambda: backend.n_running == 2)
    stub.stop()
    for read in (lambda: list(stream), lambda: whole.result(10)):
        with pytest.raises(BackendError, match="does not answer to the end") as caught:
            read()
        assert caught.value.fix
    with pytest.raises(BackendError, match="cannot be reached"):
        answer(backend, ask(adapter))
    stub.gate = None
    stub.start()
    assert answer(backend, ask(adapter)).text == f"{said_by(adapter)}: hello there"


def test_a_server_that_hangs_is_given_up(backend: VllmBackend, stub: StubVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_vllm, "WATCH_S", 0.02)
    stub.gate = threading.Event()
    future = backend.submit(ask())
    assert soon(lambda: backend.n_running == 1)
    time.sleep(0.3)
    assert not future.done()  # silent, but well
    stub.ill = True
    with pytest.raises(BackendError, match="hangs"):
        future.result(10)


def test_cancels_deadlines_and_closing_hang_up_and_keep_what_was_said(backend: VllmBackend, stub: StubVllm) -> None:
    stub.delay_s, stub.words = 0.005, [f"word{i} " for i in range(3000)]
    cancel = threading.Event()
    stream = backend.stream(ask(max_new_tokens=3000, cancel=cancel))
    first = next(stream)
    cancel.set()
    rest = "".join(stream)
    got = stream.generation
    assert got is not None and got.text == first + rest and got.finish_reason == "cancelled"
    assert 0 < got.completion_tokens < 3000 and got.prompt_tokens == 5
    assert soon(lambda: stub.hung_up == 1)
    late = backend.submit(ask(max_new_tokens=3000, deadline_s=1.5)).result(30)
    assert late.finish_reason == "cancelled" and late.text
    assert soon(lambda: stub.hung_up == 2)
    unwanted = backend.submit(ask(max_new_tokens=3000))
    assert soon(lambda: backend.n_running == 1)
    unwanted.cancel()
    assert soon(lambda: stub.hung_up == 3)
    dropped = backend.stream(ask(max_new_tokens=3000))
    next(dropped)
    del dropped
    gc.collect()
    assert soon(lambda: stub.hung_up == 4) and soon(lambda: backend.n_running == 0)


def test_a_silent_server_is_left_when_nobody_wants_the_answer(backend: VllmBackend, stub: StubVllm) -> None:
    stub.gate, cancel = threading.Event(), threading.Event()
    ended = [backend.submit(ask(cancel=cancel)), backend.submit(ask(deadline_s=0.5))]
    assert soon(lambda: backend.n_running == 2)
    cancel.set()
    assert [f.result(10).finish_reason for f in ended] == ["cancelled", "cancelled"]
    assert [f.result().text for f in ended] == ["base:", "base:"]


def test_whenever_it_is_cancelled_the_connection_is_closed(backend: VllmBackend, stub: StubVllm) -> None:
    stub.delay_s, stub.words = 0.002, [f"word{i} " for i in range(5000)]
    for n in range(40):
        cancel = threading.Event()
        future = backend.submit(ask(max_new_tokens=4000, cancel=cancel))
        assert soon(lambda: backend.n_running == 1)
        time.sleep(0.003 * n)
        cancel.set()
        assert future.result(10).finish_reason == "cancelled"
    assert soon(lambda: stub.hung_up == 40) and soon(lambda: backend.n_running == 0)


def test_one_bad_request_of_a_list_ends_the_others(backend: VllmBackend, stub: StubVllm) -> None:
    stub.delay_s, stub.words = 0.01, [f"word{i} " for i in range(1000)]
    with pytest.raises(AdapterNotFoundError):
        backend.complete([ask(max_new_tokens=1000), CompletionRequest("hi", "b" * 64)])
    assert soon(lambda: backend.n_running == backend.n_waiting == 0)


def test_closing_does_not_wait_for_a_dead_server_again_and_again(
    backend: VllmBackend, stub: StubVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in (1, 2, 3):
        hold(backend, i)
    stub.stop()
    tries: list[str] = []
    post = backend._wire.post

    def counted(path: str, body: Any) -> Any:
        tries.append(path)
        return post(path, body)

    monkeypatch.setattr(backend._wire, "post", counted)
    backend.close()
    assert backend.resident() == [] and len(tries) == 1


def test_the_thread_ends_with_the_backend(stub: StubVllm, tmp_path: Path) -> None:
    before = {t.ident for t in threading.enumerate() if t.name == "dnd-vllm"}
    backend = VllmBackend(stub.url, LAYOUT, tmp_path)
    answer(backend, ask())
    del backend
    gc.collect()
    assert soon(lambda: {t.ident for t in threading.enumerate() if t.name == "dnd-vllm"} <= before)


def test_other_weights_under_the_same_name_are_not_served_for_it(backend: VllmBackend, stub: StubVllm) -> None:
    root = backend.served.parent / "store"
    first = stored(root, 1, "task")
    backend.hold(first, lambda: None)  # type: ignore[arg-type, return-value]
    second = stored(root, 2, "task")  # replaced in the store, in the same folder
    assert answer(backend, ask(first)).text.startswith(said_by(first))
    backend.hold(second, lambda: None)  # type: ignore[arg-type, return-value]
    assert answer(backend, ask(second)).text.startswith(said_by(second))
    backend.close()
    for folder in backend.served.iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    with pytest.raises(AdapterNotFoundError, match="was replaced"):
        backend.hold(first, lambda: None)  # type: ignore[arg-type, return-value]


STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "hold", "forget", "restart", "unload", "close", "replace"]), st.integers(1, 5)),
    min_size=3,
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_no_request_ever_goes_out_under_anothers_name(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    """Whatever is held, dropped, replaced and restarted in between: who answers is who was asked."""
    root = tmp_path_factory.mktemp("home")
    adapters = [stored(root / "store", i) for i in range(6)]
    known = {a.id: a for a in adapters}
    with stub_vllm() as stub, ThreadPoolExecutor(4) as threads:
        backend = VllmBackend(stub.url, LAYOUT, root / "served", find=known.__getitem__, max_loaded=2)
        running = []
        for n, (step, i) in enumerate(steps):
            adapter = adapters[i]
            if step == "ask":
                running.append((adapter, threads.submit(answer, backend, ask(adapter, f"hello {n}"))))
            elif step == "hold":
                threads.submit(backend.hold, adapter, lambda: None)
            elif step == "forget":
                threads.submit(backend.forget, adapter.id)
            elif step == "unload":
                stub.loaded.pop(f"dnd-{adapter.id[:16]}", None)
            elif step == "replace":  # one name, other weights
                shared = stored(root / "store", 10 + n, "shared")
                known[shared.id] = shared
                running.append((shared, threads.submit(answer, backend, ask(shared))))
                running[-1][1].exception()
            elif step == "close":
                backend.close()
            else:
                stub.loaded.clear()
        for adapter, future in running:
            if future.exception() is None:
                assert future.result().text.startswith(f"{said_by(adapter)}:")
            else:  # unloaded by the other steps twice in a row
                assert isinstance(future.exception(), AdapterNotFoundError)
        for model, speaker in stub.answered:
            assert model == f"dnd-{speaker[:16]}"
