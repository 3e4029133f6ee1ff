"""Locks on folders that end with their process: nothing is left of them, not even after kill -9.

* The folder itself is locked, so there is no lock file to leave behind.
* A system or a disk without such locks is worked on unlocked, as before: the lock then says that it is not held.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


_POLL_S = 0.005


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool | float = True) -> Iterator[bool]:
    """Hold the folder's lock, alone or `shared`, and yield whether it is held.

    `wait` is for others to let go of it: True as long as it takes, False not at all, a number that many seconds, after
    which `TimeoutError` is raised. False is yielded when the folder is missing, cannot be locked, or is locked by
    others and `wait` is False. Not re-entrant: each call is a holder of its own, also within one thread.
    """
    file = _acquired(folder, shared, wait)
    try:
        yield file is not None
    finally:
        if file is not None:
            # said, not left to closing: a child forked meanwhile holds the same open file
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)


def _acquired(folder: Path, shared: bool, wait: bool | float) -> int | None:
    if fcntl is None:
        return None
    try:
        file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        held = _flocked(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait)
    except BaseException:  # Ctrl-C while waiting, too
        os.close(file)
        raise
    if not held:
        os.close(file)
        return None
    return file


def _flocked(file: int, kind: int, wait: bool | float) -> bool:
    """Take the lock; raises `TimeoutError`."""
    until = None if isinstance(wait, bool) else time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, kind if wait is True else kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError as e:
            if until is None:
                return False
            if time.monotonic() >= until:
                raise TimeoutError(f"another process has held its lock for {wait:g} s") from e
            time.sleep(_POLL_S)
        except OSError:
            return False
