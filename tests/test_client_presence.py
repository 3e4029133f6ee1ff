"""The file that says where the server of a home is: who may write it, what is believed, when it is stale."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stub_server import Stub, stub_server

from dnd_sdk.client import Presence, find_server, read_presence, remove_presence, write_presence
from dnd_sdk.config import Home
from dnd_sdk.errors import StorageError


def told(home: Home, **changes: Any) -> None:
    """Write a presence file by hand."""
    home.root.mkdir(exist_ok=True)
    said = {"schema_version": 1, "pid": os.getpid(), "url": "http://127.0.0.1:8000", "key": None, "base": "tiny"}
    path = home.root / "server.json"
    path.write_text(json.dumps({**said, "instance": "one", **changes}))
    path.chmod(0o600)


def test_what_is_written_is_read_and_is_for_its_owner_alone(home: Home) -> None:
    write_presence(home, url="http://127.0.0.1:8000", key="secret", base="tiny", instance="one")
    path = home.root / "server.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [p.name for p in home.root.iterdir()] == ["server.json"]
    assert read_presence(home) == Presence(os.getpid(), "http://127.0.0.1:8000", "secret", "tiny", "one", {})
    assert json.loads(path.read_text())["schema_version"] == 1
    write_presence(home, url="http://[::1]:9000", key=None, base="other", instance="two")
    found = read_presence(home)
    assert found is not None and (found.url, found.key, found.base) == ("http://[::1]:9000", None, "other")


def test_a_base_that_is_a_folder_is_told_by_its_place(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = {"generator": "./model", "encoder": None, "device": "model", "r": 4}
    write_presence(home, url="http://127.0.0.1:1", key=None, base="./model", instance="one", settings=settings)
    found = read_presence(home)
    assert found is not None and found.base == str(tmp_path / "model")
    assert found.settings == {"generator": str(tmp_path / "model"), "device": "model", "r": 4}


def test_only_its_own_presence_is_removed(home: Home) -> None:
    remove_presence(home, "one")
    told(home, instance="two")
    remove_presence(home, "one")
    assert read_presence(home) is not None
    remove_presence(home, "two")
    assert list(home.root.iterdir()) == []


def test_a_disk_that_refuses_is_told(home: Home) -> None:
    home.root.parent.mkdir(exist_ok=True)
    home.root.write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        write_presence(home, url="http://127.0.0.1:1", key=None, base="tiny", instance="one")
    assert read_presence(home) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 2},
        {"pid": "1"},
        {"pid": True},
        {"pid": -1},
        {"url": "https://127.0.0.1:8000"},
        {"url": "http://127.0.0.1"},
        {"url": "http://127.0.0.1:99999"},
        {"url": "http://me@127.0.0.1:80"},
        {"url": "http://127.0.0.1:80/x"},
        {"url": "http://127.0.0.1:80\r\nX: y"},
        {"url": None},
        {"key": "a\r\nX: y"},
        {"key": "\u20ac"},
        {"key": 5},
        {"base": ""},
        {"instance": "x" * 5000},
        {"settings": ["device"]},
    ],
)
def test_what_is_not_as_we_write_it_is_not_believed(home: Home, changes: dict[str, Any]) -> None:
    told(home)
    assert read_presence(home) is not None
    told(home, **changes)
    assert read_presence(home) is None


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff", b"[" * 9000, b" " * 20_000 + b"{}"])
def test_damaged_files_count_as_none(home: Home, raw: bytes) -> None:
    told(home)
    (home.root / "server.json").write_bytes(raw)
    assert read_presence(home) is None and find_server(home) is None


def test_a_file_that_others_may_write_or_that_leads_elsewhere_is_not_believed(home: Home, tmp_path: Path) -> None:
    told(home)
    path = home.root / "server.json"
    path.chmod(0o620)
    assert read_presence(home) is None
    path.chmod(0o600)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert read_presence(home) is None
    path.unlink()
    os.mkfifo(path, 0o600)
    assert read_presence(home) is None


def test_a_server_that_answers_is_found(home: Home) -> None:
    assert find_server(home) is None
    with stub_server() as stub:
        write_presence(home, url=stub.url, key="secret", base="tiny", instance=stub.instance)
        assert find_server(home) == read_presence(home)
        assert "Authorization" not in stub.asked[0].headers  # whoever has the port now need not learn the key
    assert read_presence(home) is not None and find_server(home) is None  # refused


@pytest.mark.parametrize("body", [{"instance": "other"}, {"status": "ok"}, [1], "text"])
def test_another_server_at_its_address_is_not_taken_for_it(home: Home, body: object) -> None:
    with stub_server() as stub:
        stub.says("GET", "/health", body)
        told(home, url=stub.url, instance=stub.instance)
        assert find_server(home) is None


def test_a_server_whose_process_is_gone_is_not_asked(home: Home, stub: Stub) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    told(home, url=stub.url, instance=stub.instance, pid=child.pid)
    assert find_server(home) is None and stub.asked == []
    told(home, url=stub.url, instance=stub.instance, pid=2**70)
    assert find_server(home) is None


def test_what_speaks_no_http_or_nothing_at_all_is_no_server(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnd_sdk.client.presence.HEALTH_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told(home, url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert find_server(home) is None


@pytest.fixture
def stub() -> Any:
    with stub_server() as running:
        yield running
