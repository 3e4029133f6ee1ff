"""`<home>/server.json`: how commands find the server of their home; written while it listens.

Files stay behind when a server is killed, and process ids are used again: only an answer of the instance that the file
names shows that it still runs.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dnd_sdk.client.http import get_json
from dnd_sdk.config import Home
from dnd_sdk.errors import DndError
from dnd_sdk.files import read_json, replacing, storage_errors
from dnd_sdk.machine import is_alive

FILE = "server.json"
PLACES = ("generator", "encoder")
"""Settings that may name a folder, beside the base."""
_VERSION = 1
_MAX_BYTES, _MAX_TEXT = 16_384, 4_096
HEALTH_TIMEOUT_S = 3.0
"""A server that computes on all cores still answers within it."""


@dataclass(frozen=True)
class Presence:
    """What a server says of itself."""

    pid: int
    url: str
    """`http://HOST:PORT`."""
    key: str | None
    """What it asks of whoever calls; None: nothing."""
    base: str
    """Its base as `base_key` gives it."""
    instance: str
    """Drawn anew by each server."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else it was loaded with, as far as it says so; folders as `base_key` gives them."""

    @property
    def is_running(self) -> bool:
        """Whether this very server answers."""
        return is_alive(self.pid) and self._answers()

    def _answers(self) -> bool:
        try:
            return get_json(self.url, "/health", timeout_s=HEALTH_TIMEOUT_S).get("instance") == self.instance
        except (OSError, DndError):
            return False


def base_key(name: str) -> str:
    """The name of a model for comparing: of a folder its place, since others may name it from elsewhere."""
    try:
        folder = Path(name).expanduser()
        return str(folder.resolve()) if folder.is_dir() else name
    except (OSError, ValueError, RuntimeError):  # no name of a folder at all
        return name


def write_presence(
    home: Home, *, url: str, key: str | None, base: str, instance: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Say that this process serves the home, in place of whoever said so before; raises `StorageError`.

    `settings` are those it was loaded with, for commands that ask for particular ones; None: none are told.
    """
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    loaded = {name: base_key(value) if name in PLACES else value for name, value in given.items()}
    told = Presence(os.getpid(), url, key, base_key(base), instance, loaded)
    path = home.root / FILE
    with storage_errors("write", path):
        home.root.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            # for its owner alone from the first byte on: it may hold a key
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(file, "w", encoding="utf-8") as f:
                json.dump({"schema_version": _VERSION, **asdict(told)}, f)


def remove_presence(home: Home, instance: str) -> None:
    """Take back what this instance said; another's is left, and a disk that refuses, too."""
    told = read_presence(home)
    if told is not None and told.instance == instance:
        try:
            (home.root / FILE).unlink(missing_ok=True)
        except OSError:  # at the end of a server nobody could help
            return


def find_server(home: Home) -> Presence | None:
    """The running server of this home; None: none, or one that does not answer."""
    told = read_presence(home)
    return told if told is not None and told.is_running else None


def read_presence(home: Home) -> Presence | None:
    """What the file says, whether or not it still holds; None: nothing of use."""
    try:
        if not _is_trusted(home.root):
            return None
        return _checked(read_json(home.root, FILE, _MAX_BYTES))
    except (OSError, DndError):
        return None


def _is_trusted(folder: Path) -> bool:
    """Whether nobody else could have written the file: prompts are sent to whom it names."""
    if not hasattr(os, "getuid"):
        return True
    status = (folder / FILE).lstat()
    theirs = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid in (os.getuid(), folder.stat().st_uid) and not theirs


def _checked(data: dict[str, Any]) -> Presence | None:
    pid, key = data.get("pid"), data.get("key")
    texts = [data.get(name) for name in ("url", "base", "instance")]
    if data.get("schema_version") != _VERSION or type(pid) is not int or pid <= 0:
        return None
    if not all(isinstance(t, str) and 0 < len(t) <= _MAX_TEXT for t in texts) or not _is_plain_url(str(texts[0])):
        return None
    if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable()):
        return None
    settings = data.get("settings", {})
    if not isinstance(settings, dict):
        return None
    return Presence(pid, str(texts[0]), key, str(texts[1]), str(texts[2]), settings)


def _is_plain_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return url == f"http://{parts.netloc}" and bool(parts.hostname and parts.port) and "@" not in parts.netloc
    except ValueError:
        return False
