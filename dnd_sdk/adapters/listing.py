"""`Listing`: the sound adapters under a root, each manifest read once as long as it is the same file."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dnd_sdk.adapters.adapter import MANIFEST, Adapter, check_name, read_manifest
from dnd_sdk.adapters.folders import AdapterFolders
from dnd_sdk.errors import DndError

log = logging.getLogger(__name__)

_Signature = tuple[int, int, int]


class Listing:
    """What can be listed; damaged folders are skipped with a warning, once each. Safe to share between threads."""

    def __init__(self, folders: AdapterFolders) -> None:
        self._folders = folders
        self._read: dict[str, tuple[_Signature, Adapter]] = {}
        self._warned: set[str] = set()

    def adapters(self) -> list[Adapter]:
        """Every sound adapter by name; raises `StorageError` when the root cannot be listed."""
        return [adapter for name in self._folders.names() if (adapter := self._try_read(name)) is not None]

    def forget(self, name: str) -> None:
        """Take what comes next under this name for something new."""
        self._read.pop(name, None)
        self._warned.discard(name)

    def _try_read(self, name: str) -> Adapter | None:
        try:
            check_name(name)
            return self._folders.read(name, self._read_cached)
        except DndError as e:
            if name not in self._warned:
                self._warned.add(name)
                log.warning("skipping damaged adapter folder %r: %s", name, e.message)
            return None

    def _read_cached(self, folder: Path) -> Adapter:
        try:
            status = os.stat(folder / MANIFEST)
        except OSError:
            return read_manifest(folder)  # raises, saying what is wrong
        signature = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = self._read.get(folder.name)
        if known is None or known[0] != signature:
            known = self._read[folder.name] = (signature, read_manifest(folder))
        return known[1]
