"""Locks on folders that end with their process: nothing is left of them, not even after kill -9.

* The folder itself is locked, so there is no lock file to leave behind.
* A system or a disk without such locks is worked on unlocked, as before: the lock then says that it is not held.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the folder's lock, alone or `shared`, and yield whether it is held.

    False: the folder is missing, cannot be locked, or is locked by others and `wait` is False. Not re-entrant: each
    call is a holder of its own, also within one thread.
    """
    file = _acquired(folder, shared, wait)
    try:
        yield file is not None
    finally:
        if file is not None:
            # said, not left to closing: a child forked meanwhile holds the same open file
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)


def _acquired(folder: Path, shared: bool, wait: bool) -> int | None:
    if fcntl is None:
        return None
    try:
        file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(file)
        return None
    except BaseException:  # Ctrl-C while waiting
        os.close(file)
        raise
    return file
