"""Replacing several files of a folder at once: staged aside, then moved; what a kill cuts short is finished later.

What is not finished lies in the root's folder `.store`, so that the root itself changes only when adapters do:
* `put-*` is a folder being filled, `rm-*` one being deleted: of a dead process, both are rubbish.
* `set-<32 hex>-NAME` holds files on their way into the folder NAME: the rename to that name is the moment they count,
  whoever finds them later moves the rest.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from dnd_sdk.adapters.adapter import MANIFEST, is_name, read_manifest
from dnd_sdk.errors import DndError
from dnd_sdk.files import replacing

log = logging.getLogger(__name__)

STALE_S = 3600.0
"""Where nobody can tell by the lock, a temporary folder this old belongs to a process that died."""
STATE = ".store"
PUTTING, REMOVING, SETTING = "put-", "rm-", "set-"


def temporary(prefix: str) -> str:
    """A name nobody else uses."""
    return f"{prefix}{os.getpid()}-{uuid.uuid4().hex}"


def entries_of(state: Path) -> list[str]:
    """What is not finished, and the journal; empty where there is no such folder."""
    try:
        return os.listdir(state)
    except (FileNotFoundError, NotADirectoryError):
        return []


def stage(state: Path, name: str, files: Mapping[str, bytes]) -> Path:
    """Write files meant for the folder `name`; once this returns they count, the manifest among them."""
    filling, staged = state / temporary(PUTTING), state / f"{SETTING}{uuid.uuid4().hex}-{name}"
    try:
        filling.mkdir()
        for file, data in files.items():
            with (filling / file).open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        os.rename(filling, staged)
    except BaseException:
        shutil.rmtree(filling, ignore_errors=True)
        raise
    return staged


def finish(staged: Path) -> bool:
    """Move staged files into their folder, the manifest last; False, and nothing moved, if their adapter is gone.

    Stopped anywhere, it can be done again. Raises `OSError`.
    """
    root = staged.parent.parent
    folder = root / _target(staged)
    wanted = _same_adapter(staged, folder)
    if wanted:
        # the manifest last: as long as it is here, the rest can be told to belong to the folder
        for path in sorted(staged.iterdir(), key=lambda p: p.name == MANIFEST):
            _move(path, folder / path.name)
        now = time.time_ns()  # whoever was killed before the journal knew leaves the root changed
        os.utime(root, ns=(now, now))
    shutil.rmtree(staged, ignore_errors=True)
    return wanted


def finish_all(state: Path) -> None:
    """Finish what killed processes had staged; whoever calls holds the root's lock where there are locks."""
    for name in sorted(entries_of(state)):
        if not name.startswith(SETTING):
            continue
        path = state / name
        if path.is_symlink() or not path.is_dir() or not is_name(_target(path)):
            log.warning("removing %s, which no process of this store left", path)
            delete(path)
            continue
        log.info("finishing %s, left by a process that died", path)
        finish(path)


def sweep_state(state: Path, alone: bool) -> None:
    """Delete what killed processes left; not `alone` (others may be at work), only what is old."""
    for name in entries_of(state):
        path = state / name
        if name.startswith((PUTTING, REMOVING)) and (alone or _age_s(path) > STALE_S):
            log.info("removing %s, left by a process that died", path)
            delete(path)


def delete(path: Path) -> None:
    """Remove a file, link or folder, as far as it goes."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _target(staged: Path) -> str:
    """The name of the folder that staged files are meant for."""
    return staged.name[len(SETTING) + 33 :]


def _same_adapter(staged: Path, folder: Path) -> bool:
    if not (staged / MANIFEST).exists():
        return folder.is_dir()  # moved already: nothing is left to move
    try:
        return read_manifest(staged).id == read_manifest(folder).id
    except DndError:
        return False


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except FileNotFoundError:
        if source.exists():
            raise  # the target's folder is gone; a missing source was moved by another
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        with replacing(target) as copy:  # the adapter's folder is a link to another disk
            shutil.copyfile(source, copy)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0
