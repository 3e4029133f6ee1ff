"""Stopping a server: it is asked, waited for within bounds, and how it ended is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runner import dnd, dnd_json

from dnd_sdk.client import find_server, read_presence, stop_server
from dnd_sdk.config import Home
from dnd_sdk.errors import ServerError

SERVER = """
import signal, sys, time
sys.path.insert(0, {tests!r})
from stub_server import stub_server
from dnd_sdk.client import remove_presence, write_presence
from dnd_sdk.config import Home

def told(*_):
    raise SystemExit

home = Home.find({home!r})
signal.signal(signal.SIGTERM, told if {heeds} else signal.SIG_IGN)
with stub_server() as stub:
    stub.says("GET", "/dnd/status", {{"settings": {{}}}})
    write_presence(home, url=stub.url, key=None, base="tiny", instance=stub.instance)
    print("up", flush=True)
    try:
        time.sleep(60)
    finally:
        remove_presence(home, stub.instance)
"""


@contextmanager
def server(home: Home, *, heeds: bool = True) -> Iterator[subprocess.Popen[str]]:
    """A process that is the server of the home."""
    script = SERVER.format(tests=str(Path(__file__).parent), home=str(home.root), heeds=heeds)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_server_is_stopped_and_waited_for(home: Home) -> None:
    with server(home) as process:
        assert dnd_json("ps")["server"]["pid"] == process.pid
        stopped = dnd_json("stop")["stopped"]
        assert stopped["pid"] == process.pid and 0 <= stopped["seconds"] < 30
        assert process.wait(10) == 0 and read_presence(home) is None
    assert dnd_json("stop") == {"schema_version": 1, "stopped": None}
    assert dnd("stop").stdout == f"no server runs for {home.root}\n"


def test_for_people(home: Home) -> None:
    with server(home):
        shown = dnd("stop")
        assert shown.exit_code == 0 and shown.stdout.startswith("stopped after ")
        assert "stopping the server at http://127.0.0.1:" in shown.stderr


def test_one_that_does_not_end_is_told(home: Home) -> None:
    with server(home, heeds=False) as process:
        told = dnd_json("stop", "--timeout", 0.2, code=1)["error"]
        assert told["type"] == "ServerError" and "still runs 0.2 s after" in told["message"]
        assert f"kill -9 {process.pid}" in told["fix"]
        assert find_server(home) is not None


def test_one_that_has_just_gone_or_is_another_users(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(home) as process:
        found = find_server(home)
        assert found is not None
        process.terminate()
        process.wait(10)
    assert stop_server(found, timeout_s=1) == 0.0

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("os.kill", refuse)
    with pytest.raises(ServerError, match="is another user's"):
        stop_server(found, timeout_s=1)
