"""What no request gets past: keys, hosts, sizes; and that every error has OpenAI's form and tells no path."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_parts import CHAT, HeldEncoder, Served, chat_body, connect, error_of, quiet, serving
from tiny_world import World, make_world, prompts_of

from dnd_sdk.errors import AdapterCorruptError, BusyError, ConfigError, InputError, StorageError
from dnd_sdk.server import ServerSettings
from dnd_sdk.server.problems import problem_of, without_paths

KEYS = ("agents=a-long-secret", "another-secret")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    dnd = make_world(tmp_path_factory.mktemp("world")).session()
    with serving(dnd, max_body_bytes=10_000, max_upload_bytes=50_000, body_timeout_s=1.0) as now:
        yield now


def test_a_key_is_asked_for_where_there_are_some(world: World) -> None:
    with serving(world.elsewhere(), api_keys=KEYS) as now:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic a-long-secret"}):
            status, error = now.problem("GET", "/v1/models", headers=headers)
            assert (status, error["code"]) == (401, "invalid_api_key") and "secret" not in error["message"]
        for key in ("a-long-secret", "another-secret"):
            assert now.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert now.http.get("/health").status_code == now.http.get("/ready").status_code == 200


def test_any_key_will_do_where_there_are_none(served: Served) -> None:
    assert served.http.get("/v1/models", headers={"authorization": "Bearer none"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::2]:80"])
def test_another_host_is_refused(served: Served, host: str) -> None:
    assert served.problem("GET", "/v1/models", headers={"host": host})[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:80"])
def test_its_own_names_are_taken(served: Served, host: str) -> None:
    assert served.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_pages_of_other_sites_may_not_ask(served: Served) -> None:
    for origin in ("https://evil.example", "null", "http://localhost.evil.example"):
        status, error = served.problem("POST", CHAT, json=chat_body("hi"), headers={"origin": origin})
        assert (status, error["code"]) == (403, "origin_not_allowed")
    own = served.http.post(CHAT, json=chat_body("hi", max_tokens=1), headers={"origin": served.now.url})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers


def test_hosts_that_are_allowed_are() -> None:
    outside = ServerSettings(host="0.0.0.0", api_keys=KEYS)
    assert outside.is_called("anything.example:80")
    named = ServerSettings(host="0.0.0.0", api_keys=KEYS, allowed_hosts=["dnd.example"])
    assert named.is_called("DND.example:80") and named.is_called("localhost") and not named.is_called("other.example")
    assert ServerSettings(allowed_hosts=["*"]).is_called("anything.example")


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"host": "0.0.0.0"}, "no key"),
        ({"host": ""}, "host"),
        ({"port": 70_000}, "port"),
        ({"port": "8000"}, "port"),
        ({"api_keys": ["short"]}, "API key 1"),
        ({"api_keys": ["a=long-enough-key", "a=another-long-key"]}, "API key 2"),
        ({"api_keys": "a-long-secret"}, "api_keys"),
        ({"api_keys": [3]}, "api_keys"),
        ({"max_waiting": -1}, "max_waiting"),
        ({"answer_tokens": 0}, "answer_tokens"),
        ({"body_timeout_s": 0}, "body_timeout_s"),
        ({"shutdown_s": float("nan")}, "shutdown_s"),
        ({"log_prompts": "yes"}, "log_prompts"),
        ({"sampling": {"temperature": 99}}, "temperature"),
    ],
)
def test_settings_that_cannot_be_are_refused(bad: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        ServerSettings(**bad)
    assert "secret" not in str(caught.value)


def test_a_taken_port_is_said_before_anything_is_loaded(world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen"), serving(world.elsewhere(), port=taken.getsockname()[1]):
            pass


BAD: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/nothing", {}, 404),
    ("PATCH", CHAT, {}, 405),
    ("GET", "/v1/models/nobody", {}, 404),
    ("GET", "/v1/models/..%2f..%2fetc", {}, 404),
    ("POST", CHAT, {"json": chat_body("hi", "nobody")}, 404),
    ("POST", CHAT, {"json": {**chat_body("hi"), "model": "encoder"}}, 404),
    ("POST", CHAT, {"json": {}}, 400),
    ("POST", CHAT, {"json": []}, 400),
    ("POST", CHAT, {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
    ("POST", CHAT, {"content": b'"\xff\xfe"', "headers": {"content-type": "application/json"}}, 400),
    ("POST", CHAT, {"content": b"[" * 9000, "headers": {"content-type": "application/json"}}, 400),
    ("POST", CHAT, {"content": b"model=x", "headers": {"content-type": "text/plain"}}, 400),
    ("POST", CHAT, {"json": {**chat_body("hi"), "messages": []}}, 400),
    ("POST", CHAT, {"json": {**chat_body("hi"), "messages": [{"role": "king", "content": "hi"}]}}, 400),
    ("POST", CHAT, {"json": {**chat_body("hi"), "messages": [{"role": "user"}]}}, 400),
    ("POST", CHAT, {"json": chat_body("hi", max_tokens=0)}, 400),
    ("POST", CHAT, {"json": chat_body("hi", max_tokens=10**9)}, 400),
    ("POST", CHAT, {"json": chat_body("hi", temperature=11)}, 400),
    ("POST", CHAT, {"json": chat_body("hi", n=99)}, 400),
    ("POST", CHAT, {"json": chat_body("hi", stop=[""])}, 400),
    ("POST", CHAT, {"json": chat_body("hi", top_logprobs=3)}, 400),
    ("POST", CHAT, {"json": chat_body("hi", dnd={"prompts": [" "]})}, 400),
    ("POST", CHAT, {"json": chat_body("hi", dnd={"mode": "no"})}, 400),
    ("POST", CHAT, {"json": chat_body("\ud800")}, 400),
    (
        "POST",
        CHAT,
        {"json": chat_body("x", response_format={"type": "json_schema", "json_schema": {"schema": {"type": "no"}}})},
        400,
    ),
    ("POST", "/v1/completions", {"json": {"model": "base", "prompt": [1, 2]}}, 400),
    ("POST", "/v1/completions", {"json": {"model": "base", "prompt": []}}, 400),
    ("POST", "/v1/embeddings", {"json": {"model": "base", "input": "hi"}}, 404),
    ("POST", "/v1/embeddings", {"json": {"model": "encoder", "input": [[1]]}}, 400),
    ("POST", "/v1/embeddings", {"json": {"model": "encoder", "input": " "}}, 400),
    ("POST", "/v1/embeddings", {"json": {"model": "encoder", "input": "hi", "dimensions": 3}}, 400),
    ("POST", "/dnd/adapt", {"json": {"prompts": []}}, 400),
    ("POST", "/dnd/adapt", {"json": {"prompts": ["a"], "name": "../up"}}, 400),
    ("POST", "/dnd/adapt", {"json": {"prompts": ["a"], "mode": "no"}}, 400),
    ("POST", "/dnd/adapt", {"content": b"a", "headers": {"content-type": "text/plain"}}, 415),
    ("POST", "/dnd/adapt", {"files": {"other": ("a.txt", b"a")}}, 400),
    ("POST", "/dnd/adapt", {"files": {"file": ("a.exe", b"a\0b")}}, 400),
    ("POST", "/dnd/adapt", {"files": {"file": ("../../etc/passwd.txt", b"\xff\xff")}}, 400),
    ("POST", "/dnd/route", {"json": {"prompts": [" "]}}, 400),
    ("POST", "/dnd/observe", {"json": {"prompt": ""}}, 400),
    ("GET", "/dnd/adapters/nobody", {}, 404),
    ("GET", "/dnd/adapters/%2e%2e", {}, 404),
    ("DELETE", "/dnd/adapters/nobody", {}, 404),
    ("PUT", "/dnd/adapters/nobody/pin", {}, 404),
    ("GET", "/dnd/log?limit=0", {}, 400),
    ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "a", "lora_path": "/etc"}}, 400),
    ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "a", "lora_path": "a"}}, 404),
    (
        "POST",
        "/dnd/adapters",
        {"files": {"config": ("c", b"{}"), "weights": ("w", b"not weights"), "name": (None, "mine")}},
        422,
    ),
    ("POST", "/dnd/adapters", {"files": {"config": ("c", b"{}")}}, 400),
]


@pytest.mark.parametrize(("method", "path", "more", "status"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_said_in_openais_form(
    served: Served, method: str, path: str, more: dict[str, Any], status: int
) -> None:
    if "json" in more:
        import json

        more = {**more, "content": json.dumps(more["json"]), "headers": {"content-type": "application/json"}}
        del more["json"]
    answer = served.http.request(method, path, **more)
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert len(error["message"]) < 2000 and "Traceback" not in answer.text
    assert not re.search(r"/(tmp|home|root|work|usr)/", answer.text)
    assert served.dnd.engine.n_running == 0 and served.dnd.store.ls() == []


def test_a_prompt_too_long_is_told_as_openai_does(served: Served) -> None:
    room = served.dnd.engine.context_tokens
    for more in ({"max_tokens": room}, {}):
        text = "hi" if more else "word " * room
        status, error = served.problem("POST", CHAT, json=chat_body(text, **more))
        assert (status, error["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_refused_before_it_is_read(served: Served, chunked: bool) -> None:
    body = b'{"model": "' + b"x" * 200_000
    content: Any = (body[i : i + 5000] for i in range(0, len(body), 5000)) if chunked else body
    answer = served.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 413 and error_of(answer)["code"] == "too_large"
    assert answer.headers["connection"] == "close"


def test_files_may_be_larger_than_other_bodies(served: Served) -> None:
    rows = "\n".join(f"prompt number {i} of a longer file" for i in range(700))
    answer = served.http.post("/dnd/adapt", files={"file": ("p.txt", rows.encode())})
    assert answer.status_code == 200 and answer.json()["n_prompts"] == 512
    served.dnd.store.rm(answer.json()["adapter"]["name"])
    assert served.http.post("/dnd/adapt", files={"file": ("p.txt", rows.encode() * 3)}).status_code == 413


def _raw(served: Served, *pieces: bytes, wait_s: float = 0.0) -> bytes:
    """What comes back for bytes on a bare socket."""
    with connect(served) as sock:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(wait_s)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    return answer


def test_a_body_that_does_not_come_is_not_waited_for(served: Served) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
    answer = _raw(served, head.encode(), b'{"model"')
    assert answer.startswith(b"HTTP/1.1 408") and b'"code":"timeout"' in answer


def test_a_full_queue_says_when_to_come_back(world: World) -> None:
    dnd = world.session()
    held = threading.Event()
    with serving(dnd, max_waiting=0) as now:
        busy = [dnd.submit("hi", emit=lambda _: held.wait(20) and None, max_new_tokens=3) for _ in range(18)]
        try:
            status, error = now.problem("POST", CHAT, json=chat_body("hi"))
            assert (status, error["code"]) == (429, "busy")
            assert now.http.post(CHAT, json=chat_body("hi")).headers["retry-after"] == "2"
            assert now.http.get("/ready").status_code == 429
        finally:
            held.set()
        assert all(b.completion(30).usage for b in busy) and quiet(dnd)
        assert now.chat("hi", max_tokens=1)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AdapterCorruptError("/home/me/adapters/a/x.safetensors is cut"), 422),
        (StorageError("cannot write '/home/me/adapters': full", fix="free ~/adapters"), 500),
        (BusyError("no"), 429),
        (InputError("message 1, and 1/2 of https://a.b/c"), 400),
        (RuntimeError("/home/me/secret"), 500),
    ],
)
def test_no_path_leaves_the_machine(error: Exception, status: int) -> None:
    told = problem_of(error)
    assert told.status == status and "home" not in str(told.body) and "secret" not in str(told.body)


def test_what_is_no_path_stays() -> None:
    for text in ("1/2 of it", "see https://a.b/tmp/c", "and/or", "a $ref '#/defs/x'", "place /properties/n", "~5"):
        assert without_paths(text) == text
    assert without_paths("read '/tmp/a/c.txt': gone, and /etc.") == "read 'c.txt': gone, and etc."


def test_routes_do_not_hold_up_the_loop(served: Served) -> None:
    """Health is told while something long is done."""
    with HeldEncoder(served.dnd) as held, httpx.Client(base_url=served.now.url, timeout=60) as other:
        asking = threading.Thread(target=lambda: other.post("/dnd/route", json={"prompts": prompts_of("upper")[0]}))
        asking.start()
        assert held.began.wait(20) and served.http.get("/health").json()["status"] == "ok"
        held.go_on.set()
        asking.join()
