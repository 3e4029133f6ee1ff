"""`AdapterFolders`: named folders that appear and disappear whole, for any number of processes.

* A folder is filled aside and renamed into place: readers see all of it or nothing.
* Who adds or removes shares the root's lock, who replaces files has it alone; who has it alone knows that all that is
  unfinished is left from killed processes, and finishes or deletes it (see `pending`).
* Each change is told to the catalogue while nobody else changes anything.
* Nothing is flushed to the platter: after a power cut the hash in `dnd.json` tells a damaged folder from a sound one.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dnd_sdk.adapters.adapter import Adapter
from dnd_sdk.adapters.catalogue import Catalogue, folder_names
from dnd_sdk.adapters.pending import (
    PUTTING,
    REMOVING,
    SETTING,
    STATE,
    delete,
    entries_of,
    finish,
    finish_all,
    stage,
    sweep_state,
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
        self.root, self._state = root, root / STATE
        self._catalogue = Catalogue(root, self._state)
        self._swept = False

    @property
    def catalogue(self) -> Catalogue:
        """What is known of the folders, once what killed processes left is finished."""
        self._settle()
        return self._catalogue

    def names(self) -> list[str]:
        """Every entry, sorted, whatever it holds; raises `StorageError` when the root cannot be listed."""
        self._settle()
        return sorted(folder_names(self.root))

    def has(self, name: str) -> bool:
        """Whether anything of that name is there."""
        return os.path.lexists(self.root / name)

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
                self._settle()
                if failed and _identity(folder) == before:
                    raise
                failed = True
        return None

    def commit(self, adapter: Adapter, fill: Callable[[Path], None]) -> bool:
        """Let `fill` write an adapter's folder and publish it; False, and nothing changed, if its name exists.

        Raises `StorageError` when the disk is full or read-only; nothing half-written is left then, nor after Ctrl-C.
        """
        with storage_errors("store an adapter in", self.root):
            self._state.mkdir(parents=True, exist_ok=True)
            self._settle()
            with locked(self.root, shared=True), _filled(self._state / temporary(PUTTING), fill) as folder:
                with self._catalogue.changing() as record:
                    published = _rename(folder, self.root / adapter.name)
                    if published:
                        record(adapter.name, adapter)
                return published

    def replace_files(self, name: str, make: Callable[[Path], tuple[Adapter, Mapping[str, bytes]]]) -> Adapter | None:
        """Replace files of a folder by those that `make` gives for it, all or none; None if the folder is gone.

        Nobody else adds, removes or replaces meanwhile. `make` also gives the adapter as it then is; its files must
        hold the manifest, unless there are none: then nothing is done. Raises `StorageError` and what `make` raises.
        """
        folder = self.root / name
        with storage_errors("write", folder), locked(self.root):
            try:
                finish_all(self._state)
                adapter, files = make(folder)
                if files and not self._replace(adapter, files):
                    return None
            except (DndError, FileNotFoundError):
                if folder.exists():
                    raise
                return None
            return adapter

    def _replace(self, adapter: Adapter, files: Mapping[str, bytes]) -> bool:
        self._state.mkdir(exist_ok=True)
        staged = stage(self._state, adapter.name, files)
        with self._catalogue.changing() as record:
            done = finish(staged)
            if done:
                record(adapter.name, adapter)
        return done

    def remove(self, name: str) -> bool:
        """Remove a folder; False if another process was faster."""
        with storage_errors("remove", self.root / name):
            self._state.mkdir(exist_ok=True)
            aside = self._state / temporary(REMOVING)
            with locked(self.root, shared=True):
                with self._catalogue.changing() as record:
                    try:
                        os.rename(self.root / name, aside)
                    except FileNotFoundError:
                        return False
                    record(name, None)
                delete(aside)
        return True

    def _settle(self) -> None:
        """Finish what killed processes left and, once per process, delete what they did not need."""
        try:
            staged = any(n.startswith(SETTING) for n in entries_of(self._state))
            if self._swept and not staged:
                return
            if staged:
                with locked(self.root):
                    finish_all(self._state)
            if not self._swept:
                with locked(self.root, wait=False) as alone:
                    sweep_state(self._state, alone)
                    self._swept = alone
        except OSError as e:  # a read-only disk can still be read
            log.warning("what a killed process left in %s cannot be cleared: %s", self._state, e.strerror or e)


def publish(target: Path, fill: Callable[[Path], None]) -> bool:
    """Fill a temporary folder beside `target` and rename it into place; False if `target` is taken."""
    with _filled(target.parent / f".{temporary(PUTTING)}", fill) as folder:
        return _rename(folder, target)


@contextmanager
def _filled(folder: Path, fill: Callable[[Path], None]) -> Iterator[Path]:
    try:
        folder.mkdir()
        fill(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, target: Path) -> bool:
    try:
        os.rename(folder, target)
    except OSError as e:
        # the error tells, not a second look: the folder in the way may be gone again by now
        if e.errno in _TAKEN:
            return False
        raise
    return True


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = os.lstat(folder)
    except OSError:
        return None
    # inodes are used again, and times are coarse: both together tell one folder from the next
    return status.st_ino, status.st_ctime_ns
