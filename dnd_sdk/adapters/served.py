"""Adapters as an engine in another process reads them: one folder per content, which never changes.

The store's folders are named by people: of one name other weights may be found later. An engine elsewhere reads a
folder when it likes, so it gets one that is named after the weights, `dnd-<first 16 of the id>`, of the same files.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dnd_sdk.adapters.adapter import MANIFEST, Adapter, read_manifest
from dnd_sdk.adapters.checks import check_not_replaced
from dnd_sdk.adapters.folders import publish
from dnd_sdk.adapters.peft_config import CONFIG
from dnd_sdk.adapters.peft_folder import WEIGHTS
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError
from dnd_sdk.files import locked, storage_errors

if TYPE_CHECKING:
    from dnd_sdk.adapters.store import AdapterStore

_SERVED = re.compile(r"dnd-([0-9a-f]{16})")


def served_name(adapter_id: str) -> str:
    """What an engine elsewhere calls the adapter of that id."""
    return f"dnd-{adapter_id[:16]}"


def find_served(store: AdapterStore, name: str) -> Adapter | None:
    """The stored adapter of that served name or, if there is none, of that own name; None: neither."""
    match = _SERVED.fullmatch(name)
    if match is not None:
        stored = store.changes(0).adapters.values()
        alike = (a for a in stored if a is not None and a.id.startswith(match[1]))
        if (found := next(alike, None)) is not None:
            return found
    try:
        return store.get(name)
    except AdapterNotFoundError:
        return None


def served_folder(adapter: Adapter, root: Path) -> Path:
    """The folder below `root` that holds this adapter's PEFT files; links to the store's, or copies where none can be.

    Raises `AdapterNotFoundError` when the store has other weights under its name by now, `StorageError`.
    """
    folder = root / served_name(adapter.id)
    if not folder.is_dir():
        with storage_errors("write", folder), locked(adapter.path.parent, shared=True):
            _check_id(adapter.path, adapter)
            root.mkdir(parents=True, exist_ok=True)
            publish(folder, lambda new: _fill(new, adapter))
    _check_id(folder, adapter)
    return folder


def prune_served(root: Path, store: AdapterStore) -> None:
    """Remove the folders below `root` of weights that the store has no more; raises `StorageError`."""
    with storage_errors("read", root):
        names = {p.name for p in root.iterdir() if _SERVED.fullmatch(p.name)} if root.is_dir() else set()
    if names:
        kept = {served_name(a.id) for a in store.changes(0).adapters.values() if a is not None}
        for name in names - kept:
            shutil.rmtree(root / name, ignore_errors=True)


def _check_id(folder: Path, adapter: Adapter) -> None:
    """Raise unless the folder holds this adapter."""
    try:
        found = read_manifest(folder)
    except (AdapterCorruptError, FileNotFoundError) as e:
        if not folder.is_dir():
            raise AdapterNotFoundError(f"adapter {adapter.name!r} was removed", fix="adapt or import it again") from e
        raise
    check_not_replaced(found, adapter)


def _fill(new: Path, adapter: Adapter) -> None:
    for file in (CONFIG, WEIGHTS, MANIFEST):
        try:
            os.link(adapter.path / file, new / file)
        except OSError:  # another disk, or one without links
            shutil.copyfile(adapter.path / file, new / file)
    _check_id(new, adapter)  # the manifest was the last: with its id the rest is of it, too
