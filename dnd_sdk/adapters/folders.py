"""`AdapterFolders`: named folders that appear and disappear whole, for any number of processes.

* A folder is filled under a dot name and renamed into place: readers see all of it or nothing.
* Nothing is flushed to the platter: after a power cut the hash in `dnd.json` tells a damaged folder from a sound one.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from dnd_sdk.errors import DndError
from dnd_sdk.files import replacing, storage_errors

T = TypeVar("T")

log = logging.getLogger(__name__)

STALE_S = 3600.0
"""A temporary folder this old belongs to a process that died."""
_PUTTING, _REMOVING = ".put-", ".rm-"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""What renaming a folder onto something that exists may raise."""


class AdapterFolders:
    """The folders under one root; the root itself is made on the first commit."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._swept = False

    def names(self) -> list[str]:
        """Every entry, sorted, whatever it holds; raises `StorageError` when the root cannot be listed."""
        with storage_errors("list", self.root):
            try:
                return sorted(n for n in os.listdir(self.root) if not n.startswith("."))
            except FileNotFoundError:
                return []

    def has(self, name: str) -> bool:
        """Whether anything of that name is there."""
        return os.path.lexists(self.root / name)

    def version(self) -> str:
        """A token that changes whenever any process adds, removes, renames or alters a folder; costs one listing."""
        try:
            modified = self.root.stat().st_mtime_ns
            with os.scandir(self.root) as entries:
                names = sorted((e.name, e.inode()) for e in entries if not e.name.startswith("."))
        except FileNotFoundError:
            return "empty"
        except OSError:
            return "unreadable"
        return hashlib.sha256(repr((modified, names)).encode()).hexdigest()[:32]

    def read(self, name: str, reader: Callable[[Path], T]) -> T | None:
        """What `reader` makes of a folder as it was at one moment; None if it is gone.

        An error is believed only if the folder is still the one it started on: otherwise another process removed or
        replaced it in between, and the new one is read.
        """
        folder = self.root / name
        while (before := _identity(folder)) is not None:
            try:
                return reader(folder)
            except DndError:
                if _identity(folder) == before:
                    raise
        return None

    def commit(self, name: str, fill: Callable[[Path], None]) -> bool:
        """Let `fill` write a folder and publish it as `name`; False, and nothing changed, if that name exists.

        Raises `StorageError` when the disk is full or read-only; nothing half-written is left then, nor after Ctrl-C.
        """
        with storage_errors("store an adapter in", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            return publish(self.root / name, fill)

    def replace_files(self, name: str, files: Mapping[str, bytes]) -> bool:
        """Replace files of a folder, each at once and in this order, and change the version; False if it is gone.

        Raises `StorageError`; files before the one that failed are then new.
        """
        folder = self.root / name
        with storage_errors("write", folder):
            try:
                for file, data in files.items():
                    with replacing(folder / file) as temporary:
                        temporary.write_bytes(data)
            except FileNotFoundError:
                return False
            now = time.time_ns()  # finer than what the system stamps: no two changes share a tick
            os.utime(self.root, ns=(now, now))
        return True

    def remove(self, name: str) -> bool:
        """Remove a folder; False if another process was faster."""
        aside = self.root / _temporary(_REMOVING)
        with storage_errors("remove", self.root / name):
            try:
                os.rename(self.root / name, aside)
            except FileNotFoundError:
                return False
            _delete(aside)
        return True

    def _sweep(self) -> None:
        """Once per process: delete what killed processes left behind."""
        if self._swept:
            return
        self._swept = True
        for path in list(self.root.iterdir()):
            if path.name.startswith((_PUTTING, _REMOVING)) and _age_s(path) > STALE_S:
                log.info("removing %s, left by a process that died", path)
                _delete(path)


def publish(target: Path, fill: Callable[[Path], None]) -> bool:
    """Fill a temporary folder beside `target` and rename it into place; False if `target` is taken."""
    temp = target.parent / _temporary(_PUTTING)
    try:
        temp.mkdir()
        fill(temp)
        try:
            os.rename(temp, target)
        except OSError as e:
            # the error tells, not a second look: the folder in the way may be gone again by now
            if e.errno in _TAKEN:
                return False
            raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return True


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = os.lstat(folder)
    except OSError:
        return None
    # inodes are used again, and times are coarse: both together tell one folder from the next
    return status.st_ino, status.st_ctime_ns


def _temporary(prefix: str) -> str:
    return f"{prefix}{os.getpid()}-{uuid.uuid4().hex}"


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0
