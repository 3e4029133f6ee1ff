"""Making a folder in the home once, whole or not at all: beside its place, in one rename, one process at a time.

* What a killed run leaves is swept by the next one.
* A folder that is complete needs neither lock nor write access.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dnd_sdk.errors import StorageError
from dnd_sdk.files import locked, storage_errors
from dnd_sdk.models.wheels import STORAGE_FIX, Note


def install_folder(
    target: Path,
    build: Callable[[Path], None],
    *,
    is_complete: Callable[[Path], bool],
    needs: Callable[[], int] = lambda: 0,
    note: Note | None = None,
) -> Path:
    """Make `target` by `build(empty_folder)` in a temporary folder beside it, then rename; do nothing if complete.

    `needs` says how many bytes of disk the build takes at its peak. One process at a time builds; the others say so by
    `note`, wait, and find it complete. Raises `StorageError` for a full disk or a home that cannot be written.
    """
    if is_complete(target):
        return target
    with storage_errors("make", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent, wait=False) as alone:
            if alone:
                return _installed(target, build, is_complete, needs, alone)
        if note:
            note(f"waiting for another process that fetches into {target.parent}")
        with locked(target.parent) as alone:
            return _installed(target, build, is_complete, needs, alone)


def _installed(
    target: Path,
    build: Callable[[Path], None],
    is_complete: Callable[[Path], bool],
    needs: Callable[[], int],
    alone: bool,
) -> Path:
    if alone:
        _sweep(target)
    if not is_complete(target):
        _check_space(target.parent, needs())
        _build_and_rename(target, build)
    return target


def _sweep(target: Path) -> None:
    # nobody else builds while we hold the lock, so any such folder belongs to a run that is dead
    for stale in target.parent.glob(f".tmp-{target.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _check_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise StorageError(f"{folder} has {free >> 20} MB free, {n_bytes >> 20} MB are needed", fix=STORAGE_FIX)


def _build_and_rename(target: Path, build: Callable[[Path], None]) -> None:
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".tmp-{target.name}-"))
    try:
        new = work / "new"
        new.mkdir()
        build(new)
        _sync_tree(new)
        if target.exists():  # damaged or made from other pins
            os.replace(target, work / "old")
        os.replace(new, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
