"""Commands that a running server answers: when it is asked, what is shown, and that no model is loaded for it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runner import dnd, dnd_json
from stub_server import Stub, stub_server
from test_client import ADAPT, ADAPTED, CHAT, DECISION, ROUTE, chunk, whole

from dnd_sdk.cli.options import ModelOptions
from dnd_sdk.client import write_presence
from dnd_sdk.config import Home
from dnd_sdk.models import DEFAULT_BASE

STATUS: dict[str, Any] = {
    "version": "0",
    "base": DEFAULT_BASE,
    "device": "cpu",
    "resident": ["upper"],
    "running": 1,
    "waiting": 2,
    "uptime_s": 3723.4,
    "n_slots": 8,
}


class Loaded(Exception):
    """Models were loaded here."""


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise Loaded("loaded here")

    monkeypatch.setattr(ModelOptions, "load", load)


@pytest.fixture
def stub(home: Home) -> Iterator[Stub]:
    """The running server of the home."""
    with stub_server() as running:
        loaded = {"generator": "/made/here", "n_slots": None, "r": 8, "deterministic": False}
        write_presence(
            home, url=running.url, key="secret", base=DEFAULT_BASE, instance=running.instance, settings=loaded
        )
        running.streams(CHAT, whole("it ", "is", adapter="upper"))
        running.says("POST", ROUTE, DECISION)
        running.streams(ADAPT, [f"event: result\ndata: {json.dumps(ADAPTED)}\n"])
        running.says("GET", "/dnd/status", STATUS)
        yield running


def paths(stub: Stub) -> list[str]:
    return [asked.path for asked in stub.asked if asked.path != "/health"]


def test_run_is_answered_by_the_server(stub: Stub) -> None:
    shown = dnd("run", "hello", "-a", "upper", "--temperature", 0.5, "--max-new-tokens", 9)
    assert (shown.exit_code, shown.stdout) == (0, "it is\n"), shown.stderr
    assert shown.stderr == f"using the server at {stub.url}\n[upper, 2 tokens]\n"
    body = stub.asked[-1].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("dnd:upper", 0.5, 9)
    quiet = dnd("run", "-q", "hello")
    assert (quiet.stdout, quiet.stderr) == ("it is\n", "") and stub.asked[-1].body["model"] == "dnd:auto"
    found = dnd_json("run", "hello", "-a", "base")
    assert found == {
        "schema_version": 1,
        "text": "it is",
        "adapter": "upper",
        "decision": "reuse",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    assert stub.asked[-1].body["model"] == "dnd:base"
    compared = dnd_json("run", "hello", "-a", "auto", "--compare", "base")
    assert compared["base"] == {"text": "it is"}
    assert [asked.body["model"] for asked in stub.asked if asked.path == CHAT][-2:] == ["dnd:auto", "dnd:base"]


def test_run_sends_role_and_schema(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "role.md").write_text("# Role: judge\n")
    dnd("run", "hello", "-a", "upper", "--role", tmp_path / "role.md", "--schema", '{"type": "object"}')
    body = stub.asked[-1].body
    assert body["messages"][0] == {"role": "system", "content": "# Role: judge\n"}
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_route_and_adapt_are_answered_by_the_server(stub: Stub, home: Home, tmp_path: Path) -> None:
    assert dnd("route", "hello", "-q").stdout == "reuse upper\n"
    explained = dnd_json("route", "hello", "--explain")
    assert explained["neighbours"] == DECISION["neighbours"] and explained["in_distribution"] == 1
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\ntwo\n")
    made = dnd_json("adapt", prompts, "--name", "upper", "--explain")
    assert made["adapter"] == {"name": "upper", "path": str(home.adapters / "upper"), "source": "generated"}
    assert made["notes"] == ["removed 1 duplicate prompts", "calibrated"] and made["timings_s"] == {"total": 0.25}
    assert dnd("adapt", prompts, "-q", "--no-calibrate").stdout == "upper\n"
    body = stub.asked[-1].body
    assert (body["file"].count("prompt"), body["calibrate"], body["mode"]) == (2, "False", "auto")
    assert set(paths(stub)) == {ROUTE, ADAPT}


def test_chat_is_answered_by_the_server(stub: Stub) -> None:
    stub.says("GET", "/v1/models/dnd%3Aupper", {"id": "dnd:upper"})
    talk = dnd("chat", stdin="hello\n/adapter nope\n/adapter upper\nagain\n/adapter\n/base\nonce more\n")
    assert talk.exit_code == 0 and talk.stdout == "it is\n" * 3
    assert "error: " in talk.stderr
    chats = [asked.body for asked in stub.asked if asked.path == CHAT]
    assert [body["model"] for body in chats] == ["dnd:base", "dnd:upper", "dnd:base"]
    assert [m["content"] for m in chats[1]["messages"]] == ["hello", "it is", "again"]


def test_an_adapter_that_is_not_there_is_not_found(stub: Stub) -> None:
    told = {"error": {"message": "the model does not exist", "code": "model_not_found"}}
    stub.says("POST", CHAT, told, status=404)
    assert dnd_json("run", "hello", "-a", "upper", code=4)["error"]["type"] == "AdapterNotFoundError"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--base", "smollm2-135m"], f"serves {DEFAULT_BASE}, not smollm2-135m"),
        (["--device", "cuda"], "was started without device = cuda"),
        (["--n-slots", "4"], "was started without n_slots = 4"),
        (["--r", "16"], "was started without r = 16"),
        (["--deterministic"], "was started without deterministic = True"),
        (["--generator", "/made/there"], "was started without generator = /made/there"),
        (["--encoder", "other"], "was started without encoder = other"),
        (["--dtype", "float16"], "was started without dtype = float16"),
    ],
)
def test_what_the_server_has_not_is_loaded_here(stub: Stub, words: list[str], why: str) -> None:
    shown = dnd("run", "hello", "-a", "base", *words)
    assert "Loaded: loaded here" in shown.stderr and CHAT not in paths(stub)
    assert shown.stderr.splitlines()[0] == f"note: loading here, since the server at {stub.url} {why}"


def test_a_setting_counts_as_a_flag_does(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DND_DEVICE", "cuda")
    assert "loaded here" in dnd("run", "hello").stderr
    monkeypatch.setenv("DND_DEVICE", "cpu")
    monkeypatch.setenv("DND_CALIBRATE", "false")
    assert "without calibrate = False" in dnd("run", "hello").stderr


def test_what_the_server_has_is_not_loaded_here(
    stub: Stub, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "--device",
        "cpu",
        "--n-slots",
        8,
        "--r",
        8,
        "--generator",
        "/made/here",
        "--no-deterministic",
        "--dtype",
        "auto",
    ]
    assert dnd("run", "-q", "hello", *words).stdout == "it is\n"
    (tmp_path / "model").mkdir()
    write_presence(home, url=stub.url, key=None, base=str(tmp_path / "model"), instance=stub.instance)
    monkeypatch.chdir(tmp_path)
    assert dnd("run", "-q", "hello", "--base", "./model").stdout == "it is\n"


def test_no_server_and_a_dead_one_are_not_asked(stub: Stub, home: Home) -> None:
    assert "loaded here" in dnd("run", "hello", "--no-server").stderr and stub.asked == []
    stub.says("GET", "/health", {"instance": "another"})
    shown = dnd("run", "hello")
    assert "loaded here" in shown.stderr and "note" not in shown.stderr and paths(stub) == []
    missing = dnd_json("run", "hello", "-a", "nope", code=4)["error"]  # before anything is loaded
    assert missing["type"] == "AdapterNotFoundError"


def test_a_server_that_dies_meanwhile_is_told(stub: Stub) -> None:
    stub.streams(CHAT, [chunk("it ")])
    shown = dnd("run", "hello")
    assert (shown.exit_code, shown.stdout) == (1, "it ")
    assert shown.stderr.splitlines()[-1] == "fix: its log tells why; --no-server works without one"
    assert dnd_json("run", "hello", code=1)["error"]["type"] == "ServerError"


def test_ctrl_c_hangs_up(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    from dnd_sdk.cli.output import Output
    from dnd_sdk.client import AnswerStream

    closed = threading.Event()
    close = AnswerStream.close

    def piece(*_: object) -> None:
        raise KeyboardInterrupt

    def noted(self: AnswerStream) -> None:
        closed.set()
        close(self)

    monkeypatch.setattr(Output, "piece", piece)
    monkeypatch.setattr(AnswerStream, "close", noted)
    assert dnd("run", "hello").exit_code == 130 and closed.is_set()


def test_ps_shows_the_server(stub: Stub, home: Home) -> None:
    found = dnd_json("ps")["server"]
    assert found == {
        "url": stub.url,
        "pid": os.getpid(),
        **{name: STATUS[name] for name in ("version", "base", "device", "resident", "running", "waiting", "uptime_s")},
    }
    shown = dict(line.split(":", 1) for line in dnd("ps").stdout.splitlines())
    assert {name: value.strip() for name, value in shown.items()} == {
        "url": stub.url,
        "pid": str(os.getpid()),
        "base": DEFAULT_BASE,
        "device": "cpu",
        "up": "1 h 2 min",
        "resident": "1: upper",
        "requests": "1 running, 2 waiting",
    }
    assert dnd("ps", "-q").stdout == f"{stub.url}\n"
    assert stub.asked[-1].headers["Authorization"] == "Bearer secret"


def test_ps_without_a_server_says_so(home: Home) -> None:
    assert dnd_json("ps") == {"schema_version": 1, "server": None}
    assert dnd("ps").stdout == f"no server runs for {home.root}\n"
    write_presence(home, url="http://127.0.0.1:9", key=None, base="tiny", instance="gone")
    assert f"process {os.getpid()} was the server at http://127.0.0.1:9" in dnd("ps").stderr
