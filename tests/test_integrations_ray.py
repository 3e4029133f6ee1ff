"""What stands in front of the replicas, with stand-ins for them: nothing of Ray is needed here."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from adapter_folders import TINY, store_one
from helpers import random_flat
from starlette.types import ASGIApp, Message, Scope

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import BackendError, BusyError, ConfigError, DndError, MissingExtraError
from dnd_sdk.integrations import ray as package
from dnd_sdk.integrations.ray.affinity import adapter_of
from dnd_sdk.integrations.ray.exchange import Request, answered
from dnd_sdk.integrations.ray.forwarding import Faults, Forwarding
from dnd_sdk.integrations.ray.options import RayOptions, plan
from dnd_sdk.server import Guard, RequestError, ServerSettings

CHAT = "/v1/chat/completions"


class Ended(Exception):
    """A replica's process is gone."""


class Full(Exception):
    """Too many wait."""


class Failed(Exception):
    """It cannot answer."""


HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM_HEAD = {**HEAD, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}


def body(text: str, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Replicas:
    """Each request is answered by the next list: batches that are given, errors that are raised, seconds that pass."""

    def __init__(self, *answers: Sequence[Any]) -> None:
        self.left, self.asked, self.cancelled = list(answers), list[tuple[str, Request]](), 0

    def ask(self, adapter: str, request: Request) -> Replying:
        self.asked.append((adapter, request))
        return Replying(self, self.left.pop(0))


class Replying:
    def __init__(self, replicas: Replicas, steps: Sequence[Any]) -> None:
        self._replicas, self._steps = replicas, steps

    async def __aiter__(self) -> AsyncIterator[list[Message]]:  # type: ignore[misc]
        for step in self._steps:
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, list):
                yield step
            else:
                await asyncio.sleep(step)

    def cancel(self) -> None:
        self._replicas.cancelled += 1


def scope_of(path: str = CHAT, method: str = "POST", client: Any = ("127.0.0.1", 5), **headers: str) -> Scope:
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": named, "client": client, "app": object()}


def receiving(*parts: bytes) -> Callable[[], Any]:
    """The parts of a body, then nothing for ever."""
    left = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]

    async def receive() -> Message:
        if not left:
            await asyncio.sleep(3600)
        return left.pop(0)

    return receive


async def sent_by(app: ASGIApp, scope: Scope, *parts: bytes) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receiving(*(parts or (b"{}",))), send)
    return sent


def forwarding(replicas: Replicas, home: Home, *, wait_s: float = 5.0, is_open: bool = False) -> Forwarding:
    faults = Faults(ended=(Ended,), full=(Full,), failed=(Failed,))
    return Forwarding(replicas.ask, faults, AdapterStore(home), wait_s=wait_s, is_open=is_open)


def asked(replicas: Replicas, home: Home, scope: Scope | None = None, *parts: bytes) -> list[Message]:
    return asyncio.run(sent_by(forwarding(replicas, home), scope or scope_of(), *parts))


# -- which adapter


def test_the_adapter_that_a_body_names(store: AdapterStore) -> None:
    one = store_one(store, random_flat(TINY, seed=1), name="one")
    for model in ("one", "dnd:one", one.id, f"dnd:{one.id}"):
        assert adapter_of(store, CHAT, json.dumps({"model": model}).encode()) == one.id, model
    assert adapter_of(store, "/v1/completions", b'{"model": "one"}') == one.id
    assert adapter_of(store, "/v1/embeddings", b'{"model": "one"}') is None


def test_bodies_that_name_none(store: AdapterStore) -> None:
    for model in ("auto", "base"):  # names of a request, whatever the store holds
        store_one(store, random_flat(TINY, seed=2), name=model)
        assert adapter_of(store, CHAT, json.dumps({"model": f"dnd:{model}"}).encode()) is None
    others = (b"", b"\xff", b"[" * 100_000, b"[]", b"7", b"{}", b'{"model": 7}', b'{"model": []}', b'{"model": null}')
    for raw in (*others, b'{"model": ""}', b'{"model": "../one"}', b'{"model": "nobody"}'):
        assert adapter_of(store, CHAT, raw) is None, raw[:20]


def test_a_damaged_adapter_is_no_hindrance(store: AdapterStore) -> None:
    one = store_one(store, random_flat(TINY, seed=1), name="one")
    (one.path / "dnd.json").write_text("{")
    assert adapter_of(store, CHAT, b'{"model": "dnd:one"}') is None


# -- between two processes


def test_a_request_is_read_whole_and_holds_plain_data() -> None:
    request = asyncio.run(Request.of(scope_of(host="x"), receiving(b"ab", b"", b"c")))
    assert request is not None and request.body == b"abc"
    assert request.head == {
        "method": "POST", "path": CHAT, "headers": [(b"host", b"x")], "client": ("127.0.0.1", 5),
    }  # fmt: skip


def test_of_a_client_that_leaves_there_is_no_request() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    assert asyncio.run(Request.of(scope_of(), receive)) is None


async def batches_of(app: ASGIApp) -> list[list[Message]]:
    return [batch async for batch in answered(app, Request({"path": "/x"}, b"abc"))]


def test_the_head_never_comes_alone() -> None:
    async def app(scope: Scope, receive: Any, send: Any) -> None:
        got = await receive()
        await send(HEAD)
        await asyncio.sleep(0.01)
        await send(body(got["body"].decode(), more=True))
        await send(body("d", more=True))
        await asyncio.sleep(0.01)
        await send(body(scope["path"] + scope["type"]))

    assert asyncio.run(batches_of(app)) == [[HEAD, body("abc", True), body("d", True)], [body("/xhttp")]]


def test_what_the_application_raises_comes_after_what_it_said() -> None:
    async def app(scope: Scope, receive: Any, send: Any) -> None:
        await send(HEAD)
        await send(body("a", more=True))
        raise ValueError("broken")

    async def both() -> None:
        batches = answered(app, Request({}, b""))
        assert await anext(batches) == [HEAD, body("a", True)]
        with pytest.raises(ValueError, match="broken"):
            await anext(batches)

    asyncio.run(both())


def test_closing_ends_the_application_as_a_client_does_that_leaves() -> None:
    ended: list[str] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        await receive()
        try:
            await send(HEAD)
            await send(body("a", more=True))
            await receive()
        finally:
            ended.append("ended")

    async def leave() -> None:
        batches = answered(app, Request({}, b""))
        await anext(batches)
        assert ended == []
        await batches.aclose()
        assert ended == ["ended"]

    asyncio.run(leave())


# -- passing on


def test_an_answer_passes_through(home: Home, store: AdapterStore) -> None:
    one = store_one(store, random_flat(TINY, seed=1), name="one")
    replicas = Replicas([[], [HEAD, body("a", True)], [body("b", True), body("c")]])
    assert asked(replicas, home, None, b'{"model":', b' "dnd:one"}') == [
        HEAD, body("a", True), body("b", True), body("c"),
    ]  # fmt: skip
    [(adapter, request)] = replicas.asked
    assert adapter == one.id and request.body == b'{"model": "dnd:one"}' and replicas.cancelled == 0


def test_whose_replica_ends_before_it_says_anything_is_asked_again(home: Home) -> None:
    for steps in ([Ended()], [[], Ended()], [[], asyncio.CancelledError()]):
        replicas = Replicas(steps, [[], [HEAD, body("a", True)], [body("b")]])
        head, *rest = asked(replicas, home)
        assert rest == [body("a", True), body("b")] and (b"x-dnd-attempt", b"2") in head["headers"]
        assert len(replicas.asked) == 2 and replicas.asked[0] == replicas.asked[1]


def test_a_second_replica_that_ends_is_the_last(home: Home) -> None:
    replicas = Replicas([[], Ended()], [[], Ended()], [[], [HEAD, body("a")]])
    with pytest.raises(BackendError, match="one replica after the other"):
        asked(replicas, home)
    assert len(replicas.asked) == 2


@pytest.mark.parametrize("path", ["/dnd/adapt", "/dnd/observe", "/dnd/adapters", "/v1/load_lora_adapter"])
def test_what_changes_something_is_asked_once(home: Home, path: str) -> None:
    replicas = Replicas([[], Ended()], [[], [HEAD, body("a")]])
    with pytest.raises(BackendError, match="may or may not have done"):
        asked(replicas, home, scope_of(path))
    assert len(replicas.asked) == 1


def test_what_only_reads_is_asked_again(home: Home) -> None:
    replicas = Replicas([[], Ended()], [[], [HEAD, body("a")]])
    assert len(asked(replicas, home, scope_of("/dnd/adapters", "GET"))) == 2
    with pytest.raises(BackendError):
        asked(Replicas([[], Ended()], []), home, scope_of("/dnd/adapters/one", "DELETE"))


def test_a_stream_that_breaks_off_ends_with_an_error(home: Home) -> None:
    head, first, last = asked(Replicas([[], [STREAM_HEAD, body("data: 1\n\n", True)], Ended()], []), home)
    assert head == STREAM_HEAD and first == body("data: 1\n\n", True) and last["more_body"] is False
    error = json.loads(last["body"].decode().removeprefix("data: "))["error"]
    assert error["code"] == "backend" and "in the middle" in error["message"]


@pytest.mark.parametrize("head", [HEAD, STREAM_HEAD])
@pytest.mark.parametrize("error", [Ended(), Failed()])
def test_a_replica_that_ends_after_its_last_word_is_no_fault(home: Home, head: Message, error: Exception) -> None:
    """A message more would have the connection closed, on which the client's next request may be on its way."""
    replicas = Replicas([[], [head, body("a", True)], [body("b")], error], [])
    assert asked(replicas, home) == [head, body("a", True), body("b")]


def test_any_other_answer_that_breaks_off_is_cut(home: Home) -> None:
    with pytest.raises(BackendError, match="in the middle"):
        asked(Replicas([[], [HEAD, body("{", True)], Ended()], []), home)


@pytest.mark.parametrize(("error", "told"), [(Full(), BusyError), (Failed(), BackendError)])
def test_what_no_other_replica_would_help_is_told(home: Home, error: Exception, told: type[DndError]) -> None:
    replicas = Replicas([error], [[], [HEAD, body("a")]])
    with pytest.raises(told):
        asked(replicas, home)
    assert len(replicas.asked) == 1


def test_nobody_waits_for_ever_for_a_replica(home: Home) -> None:
    replicas = Replicas([3600])
    with pytest.raises(BusyError, match=r"within 0\.05 s"):
        asyncio.run(sent_by(forwarding(replicas, home, wait_s=0.05), scope_of()))
    assert replicas.cancelled == 1


def test_an_answer_may_take_longer_than_taking_it_up(home: Home) -> None:
    replicas = Replicas([[], 0.2, [HEAD, body("a")]])
    assert len(asyncio.run(sent_by(forwarding(replicas, home, wait_s=0.1), scope_of()))) == 2


@pytest.mark.parametrize("steps", [[3600], [[], 3600], [[], [STREAM_HEAD, body("a", True)], 3600]])
def test_of_a_client_that_leaves_the_work_ends(home: Home, steps: list[Any]) -> None:
    replicas = Replicas(steps, [])

    async def leave() -> None:
        task = asyncio.create_task(sent_by(forwarding(replicas, home), scope_of()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert replicas.cancelled == 1 and len(replicas.asked) == 1


def test_without_a_key_only_this_machine_is_answered(home: Home) -> None:
    for client in (("10.0.0.7", 5), ("unix", 0), None):
        replicas = Replicas([[], [HEAD, body("a")]])
        with pytest.raises(RequestError, match="only this machine"):
            asked(replicas, home, scope_of(client=client))
        assert replicas.asked == []
        assert len(asyncio.run(sent_by(forwarding(replicas, home, is_open=True), scope_of(client=client)))) == 2
    assert len(asked(Replicas([[], [HEAD, body("a")]]), home, scope_of(client=("::1", 5)))) == 2


def test_the_servers_guard_stands_before_it(home: Home) -> None:
    settings = ServerSettings(api_keys=["a-long-secret"], max_body_bytes=8)
    replicas = Replicas([[], [HEAD, body("a")]])
    app = Guard(forwarding(replicas, home, is_open=True), settings, note=lambda *_: None)

    def status(scope: Scope, *parts: bytes) -> int:
        return asyncio.run(sent_by(app, scope, *parts))[0]["status"]

    own = {"host": "localhost", "authorization": "Bearer a-long-secret", "transfer_encoding": "chunked"}
    assert status(scope_of(host="localhost")) == 401
    assert status(scope_of(**{**own, "host": "other"})) == 403
    assert status(scope_of(**own), b"1234567", b"89") == 413
    assert replicas.asked == []
    assert status(scope_of(**own), b"1234567", b"8") == 200


# -- options


def test_the_plan_is_complete_and_of_plain_values(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    monkeypatch.setenv("DND_MAX_WAITING", "7")
    monkeypatch.setenv("DND_API_KEY", "agents=a-long-secret")
    made = plan({"min_replicas": "2", "num_gpus": "0.5", "base": "base", "n_slots": "8"})  # as a command line gives it
    assert made.ray == RayOptions(min_replicas=2, num_gpus=0.5)
    assert made.load["base"] == str(tmp_path / "base") and made.load["n_slots"] == 8
    assert made.load["home"] == str(home.root) and made.load["encoder"] is None
    assert made.server.max_waiting == 7 and made.server.keys == {"agents": "a-long-secret"}
    assert plan({}).load["base"] == plan({}).load["base"].rpartition(os.sep)[2]  # a name stays one


def test_a_replica_takes_a_little_more_than_is_aimed_at() -> None:
    given = ({}, {"target_ongoing_requests": 2}, {"target_ongoing_requests": 2, "max_ongoing_requests": 9})
    assert [RayOptions(**options).most_ongoing for options in given] == [20, 3, 9]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"min_replicas": -1}, "min_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas must be at least"),
        ({"min_replicas": 0}, "no replica ever"),
        ({"replicas": 3}, "replicas"),
        ({"num_gpus": "many"}, "num_gpus"),
        ({"n_slots": 0}, "n_slots"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plan(options)


# -- without ray


@pytest.mark.parametrize("found", [None, ModuleType("ray")])  # nothing, or one without Serve
def test_without_ray_it_says_what_to_install(found: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dnd_sdk.integrations.ray.deployments", raising=False)
    monkeypatch.setitem(sys.modules, "ray", found)
    with pytest.raises(MissingExtraError, match=r'pip install "dnd-sdk\[ray\]"'):
        _ = package.build
    assert "build" in dir(package)
    with pytest.raises(AttributeError, match="anything"):
        _ = package.anything


def test_the_ingress_loads_no_torch() -> None:
    names = ("affinity", "exchange", "forwarding", "options")
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module('dnd_sdk.integrations.ray.' + name)"
    report = "\nassert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
