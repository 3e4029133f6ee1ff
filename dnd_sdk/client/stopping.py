"""Telling a server to end, and waiting until it has."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from dnd_sdk.client.presence import Presence
from dnd_sdk.errors import ServerError
from dnd_sdk.machine import is_alive

POLL_S = 0.05


def stop_server(server: Presence, *, timeout_s: float) -> float:
    """Ask a running server to end and wait for it; the seconds it took.

    It ends what it answers first, within its own limit. Raises `ServerError` when it may not be asked, or still runs
    after `timeout_s`.
    """
    began = time.monotonic()
    try:
        os.kill(server.pid, signal.SIGTERM)
    except ProcessLookupError:
        return 0.0
    except PermissionError as e:
        raise ServerError(f"process {server.pid} is another user's", fix="stop it as the user who started it") from e
    while is_alive(server.pid) and not _is_defunct(server.pid):
        if time.monotonic() - began >= timeout_s:
            raise ServerError(
                f"the server (process {server.pid}) still runs {timeout_s:g} s after it was told to stop",
                fix=f"it may be answering: wait for it with a longer --timeout, or end it with: kill -9 {server.pid}",
            )
        time.sleep(POLL_S)
    return time.monotonic() - began


def _is_defunct(pid: int) -> bool:
    """Whether a process has ended and stays as a name only, since its parent does not ask how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):  # not told here
        return False
