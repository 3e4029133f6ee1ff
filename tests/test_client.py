"""A running server asked in the library's words: what is sent, what is read, and how each failure comes back."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from stub_server import Asked, Stub, stub_server

from dnd_sdk import errors
from dnd_sdk.client import Presence, ServerClient
from dnd_sdk.client.http import read_events
from dnd_sdk.config import Home
from dnd_sdk.prompts import PromptSet, Role

CHAT, ADAPT, ROUTE = "/v1/chat/completions", "/dnd/adapt", "/dnd/route"
DECISION: dict[str, Any] = {
    "decision": "reuse",
    "score": 0.5,
    "adapter": "upper",
    "neighbours": [{"name": "upper", "score": 0.5}],
    "reason": "near",
    "probability": None,
    "in_distribution": 1,
}
ADAPTED = {
    **DECISION,
    "adapter": {"name": "upper", "source": "generated"},
    "n_prompts": 2,
    "timings_s": {"total": 0.25},
    "notes": ["calibrated"],
}


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server() as running:
        yield running


@pytest.fixture
def client(stub: Stub, home: Home) -> ServerClient:
    return ServerClient(presence(stub), home)


def presence(stub: Stub) -> Presence:
    return Presence(os.getpid(), stub.url, "secret", "tiny", stub.instance)


def chunk(text: str | None = None, reason: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": reason}
    return "data: " + json.dumps({"choices": [choice], **more}) + "\n"


def whole(*pieces: str, adapter: str | None = None) -> list[str]:
    usage = {"prompt_tokens": 3, "completion_tokens": len(pieces), "total_tokens": 9}
    route = {"adapter": adapter, "decision": "reuse" if adapter else "base", "score": None, "ms": 1}
    return [*map(chunk, pieces), chunk(None, "stop", usage=usage, dnd=route), "data: [DONE]\n"]


def test_a_chat_is_asked_with_all_that_was_set_and_read_piece_by_piece(client: ServerClient, stub: Stub) -> None:
    stub.streams(CHAT, [": hello\n", *whole("a", " b\n", adapter="upper")])
    options = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 3, "seed": 2, "stop": ("x",), "schema": '{"a":1}'}
    with client.stream("hi", "upper", role=Role.parse("# Role: judge\n"), **options) as stream:
        assert list(stream) == ["a", " b\n"]
        answer = stream.result
    assert (answer.text, answer.adapter, answer.decision, answer.finish_reason) == ("a b\n", "upper", "reuse", "stop")
    assert answer.usage == {"prompt_tokens": 3, "completion_tokens": 2}
    [asked] = stub.asked
    assert asked.headers["Authorization"] == "Bearer secret"
    assert asked.body == {
        "model": "dnd:upper",
        "messages": [{"role": "system", "content": "# Role: judge\n"}, {"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 3,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 2,
        "stop": ["x"],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"a": 1}}},
    }


def test_messages_are_sent_as_they_are_and_the_result_reads_the_rest(client: ServerClient, stub: Stub) -> None:
    stub.streams(CHAT, whole("a", "b"))
    asked = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    answer = client.complete(asked)
    assert (answer.text, answer.adapter, answer.decision) == ("ab", None, "base")
    assert (stub.asked[0].body["model"], stub.asked[0].body["messages"]) == ("dnd:base", asked)
    client.complete("x", "auto")
    assert stub.asked[1].body["model"] == "dnd:auto"


def test_under_a_role_the_user_message_is_routed_by_itself(client: ServerClient, stub: Stub) -> None:
    stub.says("POST", ROUTE, DECISION)
    stub.streams(CHAT, whole("a", adapter="upper"))
    role = Role.parse("# Role: judge\n")
    client.complete([{"role": "user", "content": "1"}, {"role": "user", "content": "2"}], "auto", role=role)
    routed, answered = stub.asked
    assert routed.body == {"prompts": ["2"], "role": "# Role: judge\n"}
    assert (answered.body["model"], answered.body["messages"][0]["role"]) == ("dnd:upper", "system")
    stub.says("POST", ROUTE, {**DECISION, "decision": "base", "adapter": None})
    client.complete("3", "auto", role=role)
    assert stub.asked[-1].body["model"] == "dnd:base"


def test_what_could_never_be_answered_is_not_sent(client: ServerClient, stub: Stub) -> None:
    with pytest.raises(errors.ConfigError, match="temperature"):
        client.stream("hi", temperature=99)
    with pytest.raises(errors.ConfigError, match="logprobs"):
        client.stream("hi", logprobs=1)
    assert stub.asked == []


def test_an_adaptation_is_followed_step_by_step(client: ServerClient, stub: Stub, home: Home) -> None:
    steps = ['event: step\ndata: {"step": "encode"}\n', ": still there\n"]
    stub.streams(ADAPT, [*steps, f"event: result\ndata: {json.dumps(ADAPTED)}\n"])
    made = client.adapt(PromptSet(("a", "b"), ("removed 1",), 3), "generate", "upper", top_k=2, calibrate=False)
    assert made.adapter is not None
    assert (made.adapter.name, made.adapter.path, made.adapter.source) == (
        "upper",
        home.adapters / "upper",
        "generated",
    )
    assert (made.decision, made.score, made.neighbours, made.n_prompts) == ("reuse", 0.5, [("upper", 0.5)], 2)
    assert (made.notes, made.timings_s) == (["removed 1", "calibrated"], {"total": 0.25})
    assert (made.probability, made.in_distribution) == (None, 1)
    [asked] = stub.asked
    assert asked.headers["Accept"] == "text/event-stream"
    assert asked.body == {
        "mode": "generate",
        "name": "upper",
        "top_k": "2",
        "calibrate": "False",
        "file": '{"prompt": "a"}\n{"prompt": "b"}\n',
    }


def test_routing_gives_what_the_router_gives(client: ServerClient, stub: Stub) -> None:
    stub.says("POST", ROUTE, DECISION)
    found = client.route(["a"])
    assert found.adapter is not None and found.adapter.name == "upper" and found.reason == "near"
    stub.says("POST", ROUTE, {**DECISION, "adapter": None, "score": None, "decision": "base"})
    assert client.route(["a"]).adapter is None and stub.asked[-1].body == {"prompts": ["a"]}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("adapter_not_found", errors.AdapterNotFoundError),
        ("context_length_exceeded", errors.ContextLengthError),
        ("adapter_corrupt", errors.AdapterCorruptError),
        ("layout_mismatch", errors.LayoutMismatchError),
        ("no_generator", errors.GeneratorError),
        ("invalid_input", errors.InputError),
        ("invalid_value", errors.ConfigError),
        ("busy", errors.BusyError),
        ("slots_full", errors.BankFullError),
        ("storage", errors.StorageError),
        ("invalid_api_key", errors.ServerError),
        (None, errors.ServerError),
    ],
)
def test_refusals_come_back_as_the_library_raises_them(
    client: ServerClient, stub: Stub, code: str | None, kind: type[errors.DndError]
) -> None:
    told = {"error": {"message": "it is so", "type": "t", "param": None, "code": code, "fix": "do this"}}
    stub.says("POST", CHAT, told, status=400)
    stub.says("POST", ROUTE, told, status=503)
    stub.streams(ADAPT, [f"event: error\ndata: {json.dumps(told)}\n"])
    for ask in (
        lambda: client.complete("x"),
        lambda: client.route(["x"]),
        lambda: client.adapt(PromptSet(("x",), (), 1)),
    ):
        with pytest.raises(errors.DndError) as caught:
            ask()
        assert type(caught.value) is kind
        assert (caught.value.message, caught.value.fix) == ("it is so", "do this")


def test_an_error_in_the_middle_of_an_answer_is_raised_there(client: ServerClient, stub: Stub) -> None:
    stub.streams(CHAT, [chunk("a"), 'data: {"error": {"message": "full", "code": "slots_full"}}\n'])
    stream = client.stream("x")
    assert next(stream) == "a"
    with pytest.raises(errors.BankFullError, match="full"):
        next(stream)


def test_an_unknown_adapter_is_told_as_by_the_store(client: ServerClient, stub: Stub, home: Home) -> None:
    told = {"error": {"message": "the model 'dnd:uper' does not exist", "code": "model_not_found"}}
    stub.says("POST", CHAT, told, status=404)
    stub.says("GET", "/v1/models/dnd%3Auper", told, status=404)
    (home.adapters / "upper").mkdir(parents=True)
    for ask in (lambda: client.complete("x", "uper"), lambda: client.check_adapter("uper")):
        with pytest.raises(errors.AdapterNotFoundError) as caught:
            ask()
        assert str(home.adapters) in caught.value.message


@pytest.mark.parametrize("body", ["text", [1], {}, {"error": "bare"}, {"error": {"message": 5}}])
def test_a_refusal_without_a_reason_is_still_told(client: ServerClient, stub: Stub, body: object) -> None:
    stub.says("POST", ROUTE, body, status=500)
    with pytest.raises(errors.ServerError):
        client.route(["x"])


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": 5},
        {"adapter": {"source": "x"}},
        {"decision": None},
        {"score": "high"},
        {"neighbours": [1]},
        {"neighbours": [{"score": 1}]},
        {"reason": 3},
    ],
)
def test_an_answer_of_another_form_is_told_as_another_version(
    client: ServerClient, stub: Stub, change: dict[str, Any]
) -> None:
    stub.says("POST", ROUTE, {**DECISION, **change})
    with pytest.raises(errors.ServerError, match="another version") as caught:
        client.route(["x"])
    assert "dnd serve" in str(caught.value.fix)


def test_a_server_that_ends_within_an_answer_is_told(client: ServerClient, stub: Stub) -> None:
    def cut(_: Asked, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        raw = chunk("a").encode() + b"\n"
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
        handler.wfile.write(b"ff\r\ndata: {")
        handler.close_connection = True

    stub.answers["POST", CHAT] = cut
    stream = client.stream("x")
    assert next(stream) == "a"
    with pytest.raises(errors.ServerError, match="does not answer to the end") as caught:
        next(stream)
    assert "--no-server" in str(caught.value.fix)
    stub.streams(CHAT, whole("a")[:-1])  # ends without its mark
    with pytest.raises(errors.ServerError, match="does not answer to the end"):
        client.complete("x")
    stub.streams(ADAPT, ['event: step\ndata: {"step": "encode"}\n'])
    with pytest.raises(errors.ServerError, match="does not answer to the end"):
        client.adapt(PromptSet(("x",), (), 1))


def test_nobody_there_is_told_at_once(home: Home) -> None:
    with stub_server() as stub:
        gone = ServerClient(presence(stub), home)
    for ask in (gone.status, lambda: gone.complete("x"), lambda: gone.route(["x"])):
        with pytest.raises(errors.ServerError, match="does not answer"):
            ask()


def test_a_server_that_hangs_is_not_waited_for_for_ever(
    client: ServerClient, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dnd_sdk.client.call.WATCH_S", 0.02)
    let_go = threading.Event()
    stub.streams(CHAT, [chunk("a")], then=let_go.wait)
    stream = client.stream("x")
    assert next(stream) == "a"
    stub.says("GET", "/health", {"instance": "another"})
    with pytest.raises(errors.ServerError, match="does not answer to the end"):
        next(stream)
    let_go.set()


def test_a_server_that_thinks_for_long_is_waited_for(
    client: ServerClient, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dnd_sdk.client.call.WATCH_S", 0.01)
    monkeypatch.setattr("dnd_sdk.client.call.CONNECT_TIMEOUT_S", 0.1)

    def think() -> None:
        while sum(asked.path == "/health" for asked in stub.asked) < 6:
            time.sleep(0.01)
        time.sleep(0.15)

    stub.streams(ADAPT, [f"event: result\ndata: {json.dumps(ADAPTED)}\n"], then=think)
    slow = stub.answers["POST", ADAPT]

    def late(asked: Asked, handler: BaseHTTPRequestHandler) -> None:
        think()
        slow(asked, handler)

    stub.answers["POST", ADAPT] = late
    assert client.adapt(PromptSet(("x",), (), 1)).n_prompts == 2


def test_leaving_an_answer_hangs_up(client: ServerClient, stub: Stub) -> None:
    left = threading.Event()

    def for_ever(_: Asked, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        raw = chunk("a").encode() + b"\n"
        try:
            while True:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
                time.sleep(0.001)
        except OSError:
            left.set()

    stub.answers["POST", CHAT] = for_ever
    with pytest.raises(KeyboardInterrupt), client.stream("x") as stream:
        next(stream)
        raise KeyboardInterrupt
    assert left.wait(10)


class _Lines:
    """An answer's lines, as `read_events` reads them."""

    def __init__(self, raw: bytes) -> None:
        self.readline = io.BytesIO(raw).readline


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"data: 1\n\ndata: 2\n\n", [("message", "1"), ("message", "2")]),
        (b"data: 1\r\n\r\n", [("message", "1")]),
        (b"event: step\ndata:1\n\ndata: 2\n\n", [("step", "1"), ("message", "2")]),
        (b": a comment: x\n\ndata: {\ndata: }\n\n", [("message", "{}")]),
        (b"data: a:b\nid: 5\n\n\n\n", [("message", "a:b")]),
        (b"data: \xe2\x82\xac\n\n", [("message", "\u20ac")]),
        (b"event: step\n\n", []),
    ],
)
def test_events_are_read_as_the_standard_has_them(raw: bytes, found: list[tuple[str, str]]) -> None:
    assert [tuple(e) for e in read_events(_Lines(raw))] == found  # type: ignore[arg-type]


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnd_sdk.client.http.MAX_LINE_BYTES", 10)
    with pytest.raises(OSError, match="too long"):
        list(read_events(_Lines(b"data: 123456789\n\n")))  # type: ignore[arg-type]
