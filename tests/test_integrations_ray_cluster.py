"""The application on a local Ray cluster of two replicas: the server's own answers, whichever process gives them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from engine_parts import soon
from server_parts import CHAT, chat_body, error_of, events
from tiny_world import World, prompts_of

from dnd_sdk.config import Home
from dnd_sdk.session import DnD

pytest.importorskip("ray", reason="needs the extra ray")

from ray_parts import Cluster, cluster

KEY = "a-long-secret"


class Running(NamedTuple):
    """A cluster, a client of it, and a session of the same home."""

    cluster: Cluster
    http: httpx.Client
    dnd: DnD

    def chat(self, text: str, model: str, **fields: object) -> httpx.Response:
        """Ask; the answer must be one."""
        answer = self.http.post(CHAT, json=chat_body(text, model, **fields))
        assert answer.status_code == 200, answer.text
        return answer

    def working(self) -> list[int]:
        """How many requests replicas answer or have waiting; asked so often that each of them will have said so."""
        told = [self.http.get("/dnd/status").json() for _ in range(12)]
        return [status["running"] + status["waiting"] for status in told]

    def at_rest(self) -> bool:
        """Whether no replica answers anything."""
        return soon(lambda: not any(self.working()))

    def n_answered(self) -> float:
        """Answers that came to their end, of all replicas."""
        told = [self.http.get("/metrics") for _ in range(12)]
        latest = {answer.headers["x-dnd-replica"]: answer.text for answer in told}
        lines = [line for text in latest.values() for line in text.splitlines()]
        return sum(float(line.split()[-1]) for line in lines if line.startswith("dnd_answers_total"))


@pytest.fixture(scope="module")
def running(tiny_folders: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    world = tiny_folders._replace(home=Home(tmp_path_factory.mktemp("ray") / "home"))
    with DnD.load(str(world.base), world.generator, home=world.home) as dnd:
        dnd.adapt(prompts_of("upper"), mode="generate", name="upper")
        with cluster(world, min_replicas=2, api_key=[f"tests={KEY}"]) as made:
            made.wait_for(2)
            headers = {"Authorization": f"Bearer {KEY}"}
            with httpx.Client(base_url=made.url, timeout=60, trust_env=False, headers=headers) as http:
                yield Running(made, http, dnd)


def said(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def test_answers_are_the_sessions(running: Running) -> None:
    for model in (None, "upper"):
        wanted = running.dnd.complete("hello", model, max_new_tokens=6).text
        answers = [running.chat("hello", model or "base", max_tokens=6) for _ in range(4)]
        assert {said(answer) for answer in answers} == {wanted}
        assert answers[0].headers["x-dnd-adapter"] == (model or "")
    # Ray hears a little later who has it
    assert soon(lambda: running.chat("hello", "upper", max_tokens=1).headers["x-dnd-resident"] == "1")


def test_streams_schemas_routes_and_pages_are_there(running: Running) -> None:
    with running.http.stream("POST", CHAT, json=chat_body("hello", "upper", max_tokens=6, stream=True)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(answer.iter_lines())
    text = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])
    assert last == "[DONE]" and text == running.dnd.complete("hello", "upper", max_new_tokens=6).text
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
    assert json.loads(said(running.chat("hello", "upper", response_format=form))) in ("a", "b")
    prompts = prompts_of("upper")
    routed, wanted = running.http.post("/dnd/route", json={"prompts": prompts}).json(), running.dnd.route(prompts)
    assert (routed["decision"], routed["score"]) == (wanted.decision, pytest.approx(wanted.score, abs=1e-5))
    chosen = running.dnd.complete(prompts[0], "auto", max_new_tokens=2).adapter
    assert running.chat(prompts[0], "auto", max_tokens=2).headers["x-dnd-adapter"] == (chosen or "")
    assert running.http.get("/").headers["content-type"].startswith("text/html")


def test_what_one_replica_stores_the_others_answer_with(running: Running) -> None:
    body = {"prompts": prompts_of("lower"), "mode": "generate", "name": "lower"}
    assert running.http.post("/dnd/adapt", json=body).json()["adapter"]["name"] == "lower"
    body = chat_body("hello", "lower", max_tokens=16)

    def ask(_: int) -> httpx.Response:
        return running.http.post(CHAT, json=body)

    with ThreadPoolExecutor(32) as pool:  # more than one replica takes at a time
        answers = list(pool.map(ask, range(64)))
    wanted = running.dnd.complete("hello", "lower", max_new_tokens=16).text
    assert {said(answer) for answer in answers} == {wanted}
    assert {answer.headers["x-dnd-replica"] for answer in answers} == running.cluster.replicas().keys()


def test_keys_hosts_and_bounds_hold(running: Running) -> None:
    bare = {"Authorization": ""}
    cases = [
        (running.http.get("/v1/models", headers=bare), 401, "invalid_api_key"),
        (running.http.get("/v1/models", headers={"Host": "evil.example"}), 403, "host_not_allowed"),
        (running.http.post(CHAT, content=b" " * (4 * 2**20 + 1)), 413, "too_large"),
        (running.http.post(CHAT, json=chat_body("hello", "nobody")), 404, "model_not_found"),
        (running.http.post(CHAT, content=b"{"), 400, "invalid_value"),
    ]
    for answer, status, code in cases:
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert running.http.get("/health", headers=bare).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_of_a_client_that_leaves_the_row_is_freed(running: Running, stream: bool) -> None:
    body, before = chat_body("hello", "upper", max_tokens=450, n=16, stream=stream), running.n_answered()
    if stream:
        with running.http.stream("POST", CHAT, json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.TimeoutException):
            running.http.post(CHAT, json=body, timeout=0.3)
    assert running.at_rest() and running.n_answered() < before + 16  # some may have ended by themselves


def test_a_replica_that_is_killed_is_told_and_replaced(running: Running) -> None:
    """The last of this file: it leaves other replicas."""
    body, there = chat_body("hello", "upper", max_tokens=450, n=16, stream=True), running.cluster.replicas()
    assert len(there) == 2
    with running.http.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        for pid in there.values():
            os.kill(pid, signal.SIGKILL)
        *_, last = events(lines)
    assert "in the middle" in last["error"]["message"]
    wanted = running.dnd.complete("hello", "upper", max_new_tokens=6).text
    assert said(running.chat("hello", "upper", max_tokens=6)) == wanted  # waits for a replica that comes
    running.cluster.wait_for(2)


def test_no_answer_is_wrong_or_lost_while_a_replica_is_killed(tmp_path: Path) -> None:
    script = Path(__file__).with_name("ray_load.py")
    command = [sys.executable, str(script), str(tmp_path / "load"), "--requests", "300", "--kill"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    report = json.loads(ended.stdout)
    assert report["wrong"] == report["lost"] == report["left"] == 0 and report["killed"]


def test_a_replica_is_well_while_its_base_answers_and_its_home_is_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dnd_sdk.integrations.ray.deployments import Replica

    replica = Replica.__new__(Replica)  # its constructor asks Ray for its name
    replica._dnd = world.session()
    world.home.root.mkdir(exist_ok=True)
    asyncio.run(replica.check_health())
    monkeypatch.setattr(replica._dnd.engine, "complete", lambda requests: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(replica.check_health())
    monkeypatch.undo()
    shutil.rmtree(world.home.root)
    with pytest.raises(FileNotFoundError):
        asyncio.run(replica.check_health())
