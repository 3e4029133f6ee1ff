"""Slow, cut and hostile clients: each gets an error or a closed connection in bounded time, and harms nobody."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from engine_parts import soon
from hostile_parts import (
    BOUND_S,
    Attacked,
    Neighbour,
    attacked,
    chunked,
    get,
    nothing_left,
    post,
    post_head,
    resident_mb,
    small_world,
)
from pydantic import ValidationError
from server_parts import CHAT, chat_body
from tiny_world import World, make_world

from dnd_sdk.server.wire import ChatRequest, CompletionRequest, EmbeddingRequest

MB = 2**20
CHAT_HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    dnd = small_world(make_world(tmp_path_factory.mktemp("a world")))  # its paths hold a space
    with attacked(dnd, max_body_bytes=MB, max_upload_bytes=4 * MB) as server:
        yield server


@pytest.fixture(autouse=True)
def beside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is sent to the shared server, a neighbour is served as if nothing were, and nothing is left."""
    if "now" not in request.fixturenames:
        yield
        return
    server: Attacked = request.getfixturevalue("now")
    with nothing_left(server), Neighbour(server, monkeypatch):
        yield


def body(**fields: Any) -> Any:
    return chat_body("hi", **{"max_tokens": 2, **fields})


NO_HTTP = {
    "http/0.9": b"GET /\r\n\r\n",
    "noise": bytes(range(256)) + b"\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
    "many headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)),
    "a long header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 3 * MB,
    "a long path": b"GET /" + b"a" * MB,
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a folded header": b"GET /health HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "a length below zero": CHAT_HEAD + b"Content-Length: -5\r\n\r\n",
    "a length beyond all": CHAT_HEAD + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n",
    "two lengths": CHAT_HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "a length and chunks": CHAT_HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad chunks": CHAT_HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "a long chunk's head": CHAT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"a" * MB,
    "an unknown encoding": CHAT_HEAD + b"Transfer-Encoding: gzip\r\n\r\nabc",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "noise behind a request": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n\0\0\0\r\n\r\n",
}


def test_what_is_no_http_is_refused(now: Attacked) -> None:
    for name, sent in NO_HTTP.items():
        answer = now.ask(sent)
        assert answer.seconds < BOUND_S, name
        if answer.status is not None:  # else reset while it still sent
            assert answer.error["type"] == "invalid_request_error" and b"HTTP/1.1 4" in answer.data, name


def nested(n: int, inner: bytes = b"1") -> bytes:
    return b'{"properties":{"a":' * n + inner + b"}}" * n


def with_part(name: str, part: bytes) -> bytes:
    whole: bytes = json.dumps({**body(), name: "HERE"}).encode().replace(b'"HERE"', part)
    return whole


BAD_JSON = {
    "nothing": b"",
    "no JSON": b"{",
    "bad UTF-8": b'{"model":"\xff\xfe"}',
    "not a number": with_part("temperature", b"NaN"),
    "infinity": with_part("temperature", b"1e999"),
    "a number beyond all": with_part("seed", b"9" * 5000),
    "a large number": with_part("seed", b"9" * 400),
    "the model twice": with_part("x", b'1, "model": "nobody"'),
    "deep lists": b"[" * 400_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "half a pair": body(messages=[{"role": "user", "content": "\ud800"}]),
    "half a pair as the model": with_part("model", b'"\\ud800"'),
    "a deep schema": with_part("response_format", b'{"type":"json_schema","json_schema":{"schema":%s}}' % nested(500)),
    "half a pair in a schema": with_part(
        "response_format", b'{"type":"json_schema","json_schema":{"schema":{"const":"\\ud800"}}}'
    ),
    "deep tools": with_part("tools", b'[{"type":"function","function":{"name":"a","parameters":%s}}]' % nested(400)),
    "half a pair in a call": body(
        messages=[{"role": "assistant", "tool_calls": [{"id": "\ud800", "function": {"name": "a", "arguments": "{"}}]}]
    ),
    "NUL as the model": {**body(), "model": "ba\0se"},
    "a path as the model": {**body(), "model": "../../../etc/passwd"},
    "an absolute path as the model": {**body(), "model": "/etc/passwd"},
    "a long model": {**body(), "model": "a" * 100_000},
    "no object": b"null",
    "a long text": body(messages=[{"role": "user", "content": "a" * 200_000}]),
    "many stops": body(stop=["a"] * 100_000),
    "many messages": body(messages=[{"role": "user", "content": "a"}] * 20_000),
    "many parts": body(messages=[{"role": "user", "content": [{"a": 1}] * 90_000}]),
    "many choices": body(n=10**9),
    "a bomb of references": with_part(
        "response_format",
        b'{"type":"json_schema","json_schema":{"schema":{"$defs":{%s},"$ref":"#/$defs/a0"}}}'
        % b",".join(b'"a%d":{"anyOf":[{"$ref":"#/$defs/a%d"},{"type":"x"}]}' % (i, i + 1) for i in range(60)),
    ),
}


def test_bad_json_is_an_error_of_the_client(now: Attacked) -> None:
    for name, sent in BAD_JSON.items():
        answer = now.ask(post(CHAT, sent))
        assert answer.status in (400, 404), (name, answer)
        assert answer.error["type"] == "invalid_request_error" and len(answer.error["message"]) < 1000, name


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (CompletionRequest, {"model": "b", "prompt": ["a"] * 700_000}),
        (CompletionRequest, {"model": "b", "prompt": [["a"]] * 700_000}),
        (EmbeddingRequest, {"model": "b", "input": ["a"] * 700_000}),
        (ChatRequest, body(messages=[{"role": "user", "content": [{"a": 1}] * 300_000}])),
        (ChatRequest, body(messages=[{"role": "assistant", "tool_calls": [{"a": 1}] * 120}] * 2000)),
        (ChatRequest, body(messages=[1] * 300_000)),
        (ChatRequest, body(tools=[1] * 300_000)),
        (ChatRequest, body(dnd={"prompts": [1] * 300_000})),
    ],
    ids=range(8),
)
def test_a_body_fails_with_its_first_fault(kind: Any, bad: Any) -> None:
    """A list of all faults would be made on the event loop, which stood for a minute."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(bad)
    assert caught.value.error_count() <= 4


TRAVERSALS = [
    "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/dnd:..%2fupper",
    "/dnd/adapters/%00", "/dnd/adapters/..", "/dnd/adapters/%2fetc%2fpasswd", "/dnd/adapters/..%5c..%5cetc",
    "/dnd/adapters/upper%2f..%2fupper", "/dnd/adapters/upper%00", "/dnd/adapters/" + "a" * 20_000, "/dnd/adapters/CON",
    "/dnd/adapters/.", "/dnd/adapters/%E2%80%AE", "/dnd/adapters/" + "%f0%9f%98%80" * 1000, "/dnd/adapters/~root",
    "/page/../../../etc/passwd", "/page/..%2f..%2fetc%2fpasswd", "/page/%2fetc%2fpasswd", "/page/%00",
    "/page/__init__.py", "//etc/passwd", "/..", "/dnd/adapters/", "/dnd/log?limit=" + "9" * 5000, "/dnd/log?limit=-1",
    "/dnd/log?limit=%00", "/v1/models/upper/../../../etc", "http://evil.example/health", "*",
]  # fmt: skip


def test_names_that_climb_lead_nowhere(now: Attacked) -> None:
    for path in TRAVERSALS:
        for method in (b"GET", b"DELETE", b"PUT"):
            answer = now.ask(get(path).replace(b"GET", method, 1))
            assert answer.status in (400, 404, 405), (path, method, answer)
            assert answer.error["type"] == "invalid_request_error"
    assert now.served.dnd.store.get("upper")


NAMES = ["../../up", "/etc/passwd", "a\0b", "..", "\N{RIGHT-TO-LEFT OVERRIDE}", "a" * 9000, "CON"]


def test_names_of_uploads_lead_nowhere(now: Attacked) -> None:
    def files() -> set[Any]:
        return {path for path in now.served.dnd.home.root.rglob("*") if "log" not in path.name}

    before, http = files(), now.served.http
    for name in NAMES:
        named = {"config": (name, b"{}"), "weights": (name, b"x"), "prompts": (name, b"x")}
        for answer in (
            http.post("/dnd/adapt", files={"file": (name, b"\xff\xff")}),
            http.post("/dnd/adapt", files={"file": ("a.txt", b"a")}, data={"name": name}),
            http.post("/dnd/adapt", files={"file": ("a.csv", b"a,b\n1,2\n")}, data={"column": name}),
            http.post("/dnd/adapters", files=named, data={"name": "fine"}),
            http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name}),
            http.post("/dnd/adapt", json={"prompts": ["a"], "name": name}),
        ):
            now.tells_nothing(answer.content)
            assert answer.status_code in (400, 404, 422), (name, answer.text)
            assert answer.json()["error"]["message"]
    assert files() == before


def test_bodies_of_100_mb_are_not_taken(now: Attacked) -> None:
    piece, before = b" " * MB, resident_mb()
    form = b"multipart/form-data; boundary=x"
    start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
    for path, kind, first in ((CHAT, b"application/json", b""), ("/dnd/adapt", form, start), ("/health", form, b"")):
        for sent in (
            [post_head(path, 100 * MB, kind=kind), first, *[piece] * 100],
            chunked(path, [first or b" ", *[piece] * 100], kind),
        ):
            answer = now.ask(*sent)
            assert answer.status in ((413,) if path != "/health" else (405, 413)), answer.data[:200]
            assert answer.error
    assert resident_mb() - before < 50


def test_what_all_bodies_hold_is_bounded(world: World) -> None:
    with attacked(world.elsewhere(), max_body_bytes=MB, max_upload_bytes=MB, body_timeout_s=5.0) as now:
        with now.connect() as one, now.connect() as two, now.connect() as three:
            for sock in (one, two):
                sock.sendall(post_head(CHAT, MB) + b" " * (MB - 10))
            time.sleep(0.5)
            three.sendall(post_head(CHAT, MB) + b" " * (MB - 10))
            answer = three.recv(2**16)
            assert answer.startswith(b"HTTP/1.1 429") and b"retry-after" in answer.lower()
        assert soon(lambda: not now.server.server_state.connections)
        assert now.ask(post(CHAT, body())).status == 200


SLOW = {
    b"": None,
    b"GET /health HTTP/1.1\r\nHost: loc": None,
    CHAT_HEAD + b"Content-Length: 90\r\n\r\n{": 408,
    CHAT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n": 408,
    CHAT_HEAD + b"Content-Length: 9\r\n\r\n": 408,
}


def test_slow_clients_are_hung_up_on(now: Attacked) -> None:
    with ThreadPoolExecutor(60) as pool:
        asked = [(status, pool.submit(now.ask, sent)) for sent, status in SLOW.items() for _ in range(12)]
    assert [status for status, _ in asked] == [answer.result().status for _, answer in asked]


def test_a_head_that_comes_drop_by_drop_is_not_waited_for(now: Attacked) -> None:
    began = time.monotonic()
    with now.connect() as sock, suppress(ConnectionError):
        while time.monotonic() - began < BOUND_S:
            sock.sendall(b"G")
            time.sleep(0.05)
            sock.settimeout(0.001)
            with suppress(TimeoutError):
                if sock.recv(1) == b"":
                    break
            sock.settimeout(5)
    assert time.monotonic() - began < BOUND_S


def test_requests_that_are_cut_anywhere_leave_nothing(now: Attacked) -> None:
    whole = post(CHAT, body(max_tokens=60, stream=True, n=2))
    for end in range(1, len(whole) + 1, 7):
        with now.connect() as sock:
            sock.sendall(whole[:end])
            if end % 2:  # reset instead of closed
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_streams_that_are_left_at_once_leave_nothing(now: Attacked) -> None:
    whole = post(CHAT, body(max_tokens=300, stream=True))
    for i in range(60):
        with now.connect() as sock:
            sock.sendall(whole)
            if i % 3:
                assert sock.recv(1 + i % 300)


def test_half_closed_and_pipelined_requests_end(now: Attacked) -> None:
    assert now.ask(post(CHAT, body(max_tokens=50)), half_close=True).status in (None, 200)
    piped = get("/health").replace(b"Connection: close\r\n", b"") * 50 + get("/dnd/status")
    assert now.ask(piped).data.count(b"HTTP/1.1 200") == 51
    unread = get("/v1/models").replace(b"Connection: close\r\n", b"") * 2000
    with now.connect(receive_bytes=4096) as sock, suppress(TimeoutError, ConnectionError):
        sock.settimeout(2)
        sock.sendall(unread)


def test_expecting_clients_are_told_before_they_send(now: Attacked) -> None:
    expect = b"Expect: 100-continue"
    assert now.ask(post(CHAT, body(), expect)).data.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
    assert now.ask(post_head(CHAT, 100 * MB, expect)).status == 413
    assert now.ask(post_head(CHAT, 9, expect, b"Origin: http://evil.example")).status == 403


NOT_OURS = [
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example",
    "[::1].evil.example", "[::1", "0", "2130706433", "localhost.", "\\localhost", "localhost:80:evil.example",
]  # fmt: skip


def test_names_that_only_look_like_ours_are_refused(now: Attacked) -> None:
    for host in NOT_OURS:
        assert now.ask(get("/v1/models", host=host.encode())).status == 403, host
        origin = now.ask(get("/v1/models", b"Origin: http://" + host.encode()))
        assert origin.status == 403 and b"access-control" not in origin.data.lower(), host


FORM = b"multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\nb\r\n'


FORMS = [
    (FORM, PART * 10_000 + b"--x--\r\n"), (FORM, FILE * 8_000 + b"--x--\r\n"), (b"multipart/form-data", PART),
    (FORM, b""), (FORM, PART), (FORM, b"--x\r\n" + b"A: " + b"b" * MB), (FORM, b"\r\n" * MB),
    (FORM, b"--x\r\n\r\n\r\n--x--"),
    (FORM, b"--x\r\nContent-Disposition: form-data\r\n\r\nb\r\n--x--\r\n"), (b"multipart/mixed; boundary=x", PART),
    (b"multipart/form-data; boundary=" + b"x" * 5000, PART), (b"multipart/form-data; boundary=\xff", PART),
]  # fmt: skip


def test_forms_that_are_bombs_or_none(now: Attacked) -> None:
    for path in ("/dnd/adapt", "/dnd/adapters"):
        for i, (kind, sent) in enumerate(FORMS):
            answer = now.ask(post(path, sent, kind=kind))
            assert answer.status in (400, 413, 415), (path, i, answer)
            assert answer.error["type"] == "invalid_request_error"


def test_hundreds_of_wrong_keys_open_nothing(world: World) -> None:
    with attacked(world.elsewhere(), api_keys=["me=a-long-secret"]) as now, nothing_left(now):
        guesses = [b"Bearer guess-%d" % i for i in range(300)]
        guesses += [
            b"",
            b"Bearer",
            b"Bearer ",
            b"bearer a-long-secret-",
            b"Basic a-long-secret",
            b"Bearer \xff\xff\xff",
        ]
        for guess in guesses:
            answer = now.ask(get("/v1/models", b"Authorization: " + guess))
            assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
            assert b"a-long-secret" not in answer.data.replace(guess, b"") if guess else True
        assert now.ask(get("/v1/models", b"Authorization: Bearer a-long-secret")).status == 200
