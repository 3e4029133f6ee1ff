"""`AdapterFolders`: named folders that appear and disappear whole, for any number of processes.

* A folder is filled aside and renamed into place: readers see all of it or nothing.
* Files are replaced by one move, of the manifest, into the very folder that was read (see `pending`).
* So nothing is lost where locks do nothing: several machines may write (docs/scale.md). The locks keep the processes of
  one machine from undoing each other's exemplars, and have each change told to the catalogue in its turn.
* Nothing is flushed to the platter: after a power cut the hash in `dnd.json` tells a damaged folder from a sound one.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from dnd_sdk.adapters.adapter import MANIFEST, Adapter, read_manifest
from dnd_sdk.adapters.catalogue import Catalogue, folder_names
from dnd_sdk.adapters.exemplars import exemplars_files, exemplars_path
from dnd_sdk.adapters.pending import (
    PUTTING,
    REMOVING,
    STATE,
    Opened,
    delete,
    opened,
    sweep_state,
    temporary,
)
from dnd_sdk.errors import DndError
from dnd_sdk.files import is_old, locked, storage_errors

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
            with _filled(self._state / temporary(PUTTING), fill) as folder:
                with self._catalogue.changing() as record:
                    published = _rename(folder, self.root / adapter.name)
                    if published:
                        record(adapter.name, adapter)
                return published

    def replace_files(self, name: str, make: Callable[[Path], tuple[Adapter, Mapping[str, bytes]]]) -> Adapter | None:
        """Replace files of a folder by those that `make` gives for it, all or none; None if the folder is gone.

        Nobody else of this machine replaces meanwhile. `make` also gives the adapter as it then is; its files must hold
        the manifest, the last to be moved, and none that the old one needs; or there are none: then nothing is done.
        Raises `StorageError` and what `make` raises.
        """
        folder = self.root / name
        with storage_errors("write", folder), locked(self.root):
            try:
                with opened(folder) as here:
                    adapter, files = make(folder)
                    if files and not self._replace(here, adapter, files):
                        return None
            except (DndError, FileNotFoundError):
                if folder.exists():
                    raise
                return None
            return adapter

    def _replace(self, here: Opened, adapter: Adapter, files: Mapping[str, bytes]) -> bool:
        self._state.mkdir(exist_ok=True)
        with (
            _filled(self._state / temporary(PUTTING), partial(_write_files, files)) as staged,
            self._catalogue.changing() as record,
        ):
            old = exemplars_path(here.path, read_manifest(here.path).exemplars_sha256)
            if not here.is_in_place:  # what was read is another folder's
                return False
            for file in sorted(files, key=lambda name: name == MANIFEST):
                here.take(staged / file)
            if not here.is_in_place:
                return False
            now = time.time_ns()  # whoever is killed before the journal knows leaves the root changed
            os.utime(self.root, ns=(now, now))
            record(adapter.name, adapter)
            _delete_exemplars(here.path, old, exemplars_path(here.path, adapter.exemplars_sha256))
        return True

    def remove(self, name: str) -> bool:
        """Remove a folder; False if another process was faster."""
        with storage_errors("remove", self.root / name):
            self._state.mkdir(exist_ok=True)
            aside = self._state / temporary(REMOVING)
            with self._catalogue.changing() as record:
                try:
                    os.rename(self.root / name, aside)
                except FileNotFoundError:
                    return False
                record(name, None)
            delete(aside)
        return True

    def _settle(self) -> None:
        """Once per process, delete what killed processes left."""
        if self._swept:
            return
        try:
            sweep_state(self._state)
            self._swept = True
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


def _write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for file, data in files.items():
        with (folder / file).open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())


def _delete_exemplars(folder: Path, old: Path, new: Path) -> None:
    """Delete the file that was replaced, and what killed processes left; never one that is about to count."""
    for path in exemplars_files(folder):
        if path != new and (path == old or is_old(path)):
            path.unlink(missing_ok=True)


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
