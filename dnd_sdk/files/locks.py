"""Locks on folders that end with their process: nothing is left of them, not even after kill -9.

* The folder itself is locked, so there is no lock file to leave behind.
* A system or a disk without such locks is worked on unlocked, as before: the lock then says that it is not held.
* Over a network they hold within one machine: Linux's NFS client passes on locks of files, none of folders, and says
  nothing of it. What must hold between machines must hold without them (`reach`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


_POLL_S = 0.005
_MOUNTS = Path("/proc/self/mountinfo")
_UNESCAPED = re.compile(r"\\([0-7]{3})")

Reach = Literal["everybody", "machine", "nobody"]

_DISKS = {"bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs",
          "ntfs3", "overlay", "ramfs", "reiserfs", "tmpfs", "vfat", "xfs", "zfs"}  # fmt: skip
"""File systems that one machine alone writes to."""


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


def reach(folder: Path) -> Reach:
    """Whom locks in this folder hold off: everybody who can write there, the processes of this machine, or nobody."""
    if fcntl is None:
        return "nobody"
    return "everybody" if file_system(folder) in _DISKS else "machine"


def file_system(folder: Path) -> str | None:
    """What kind of file system the folder, or what there is of its path, is on; None: this system does not tell."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    there, best, found = os.path.realpath(folder), -1, None
    for line in lines:
        mount, _, rest = line.partition(" - ")
        place = _UNESCAPED.sub(lambda m: chr(int(m[1], 8)), mount.split(" ")[4])
        if (there + "/").startswith(place.rstrip("/") + "/") and len(place) >= best:  # the last of those at one place
            best, found = len(place), rest.split(" ")[0]
    return found
