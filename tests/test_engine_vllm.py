"""`VllmBackend` over a stub of vLLM's HTTP interface: what it asks, what becomes of errors, kills and cancels."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_parts import soon
from stub_vllm import StubVllm
from vllm_parts import ADD, CHAT, LAYOUT, answer, ask, hold, said_by

from dnd_sdk.chat import checked_schema, read_answer
from dnd_sdk.engine import CompletionRequest, VllmBackend
from dnd_sdk.engine import vllm as engine_vllm
from dnd_sdk.errors import (
    AdapterNotFoundError,
    BackendError,
    BusyError,
    ConfigError,
    ContextLengthError,
    DndError,
    InputError,
)

pytest_plugins = ["vllm_fixtures"]


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
    "url", ["", "localhost:8000", "ftp://x", "http://", "http://user:pw@host", "http://x:0", "http://[", "unix:x"]
)
def test_what_is_no_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="url must be like"):
        VllmBackend(url, LAYOUT, tmp_path)


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
