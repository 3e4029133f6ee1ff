"""`AdapterFolders`: named folders that appear and disappear whole, for any number of processes.

* A folder is filled under a dot name and renamed into place: readers see all of it or nothing.
* Who adds or removes shares the root's lock, who replaces files has it alone; who has it alone knows that all dot names
  are left from killed processes, and finishes or deletes them (see `pending`).
* Nothing is flushed to the platter: after a power cut the hash in `dnd.json` tells a damaged folder from a sound one.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from dnd_sdk.adapters.pending import (
    PUTTING,
    REMOVING,
    SETTING,
    delete,
    finish,
    finish_all,
    stage,
    sweep_root,
    temporary,
)
from dnd_sdk.errors import DndError
from dnd_sdk.files import locked, storage_errors

T = TypeVar("T")

log = logging.getLogger(__name__)

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
                return sorted(n for n in self._listing() if not n.startswith("."))
            except FileNotFoundError:
                return []

    def has(self, name: str) -> bool:
        """Whether anything of that name is there."""
        return os.path.lexists(self.root / name)

    def version(self) -> str:
        """A token that changes whenever any process adds, removes, renames or alters a folder; costs one listing."""
        try:
            self._listing()
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

        An error is believed only the second time, and if the folder is still the one it started on: otherwise another
        process removed or replaced it or its files in between, and the new one is read.
        """
        folder, failed = self.root / name, False
        while (before := _identity(folder)) is not None:
            try:
                return reader(folder)
            except DndError:
                # files may be half replaced: by a process at work, which is waited for, or by one that was killed
                self._mend()
                if failed and _identity(folder) == before:
                    raise
                failed = True
        return None

    def commit(self, name: str, fill: Callable[[Path], None]) -> bool:
        """Let `fill` write a folder and publish it as `name`; False, and nothing changed, if that name exists.

        Raises `StorageError` when the disk is full or read-only; nothing half-written is left then, nor after Ctrl-C.
        """
        with storage_errors("store an adapter in", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._listing()
            with locked(self.root, shared=True):
                return publish(self.root / name, fill)

    def replace_files(self, name: str, make: Callable[[Path], Mapping[str, bytes]]) -> bool:
        """Replace files of a folder by those that `make` gives for it, all or none; False if the folder is gone.

        Nobody else adds, removes or replaces meanwhile. The files must hold the manifest, unless there are none: then
        nothing is done. Raises `StorageError` and what `make` raises.
        """
        folder = self.root / name
        with storage_errors("write", folder), locked(self.root):
            try:
                finish_all(self.root)
                files = make(folder)
                return not files or finish(stage(self.root, name, files))
            except (DndError, FileNotFoundError):
                if folder.exists():
                    raise
                return False

    def remove(self, name: str) -> bool:
        """Remove a folder; False if another process was faster."""
        aside = self.root / temporary(REMOVING)
        with storage_errors("remove", self.root / name), locked(self.root, shared=True):
            try:
                os.rename(self.root / name, aside)
            except FileNotFoundError:
                return False
            delete(aside)
        return True

    def _listing(self) -> list[str]:
        """The root's entries, once what killed processes left is finished and, once per process, deleted."""
        names = os.listdir(self.root)
        if self._swept and not any(n.startswith(SETTING) for n in names):
            return names
        self._mend()
        return os.listdir(self.root)

    def _mend(self) -> None:
        try:
            if any(n.startswith(SETTING) for n in os.listdir(self.root)):
                with locked(self.root):
                    finish_all(self.root)
            if not self._swept:
                with locked(self.root, wait=False) as alone:
                    sweep_root(self.root, alone)
                    self._swept = alone
        except OSError as e:  # a read-only disk can still be read
            log.warning("what a killed process left in %s cannot be cleared: %s", self.root, e.strerror or e)


def publish(target: Path, fill: Callable[[Path], None]) -> bool:
    """Fill a temporary folder beside `target` and rename it into place; False if `target` is taken."""
    temp = target.parent / temporary(PUTTING)
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
