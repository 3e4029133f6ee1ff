"""What is not finished: folders on their way into the store and out of it, and files on their way into a folder.

They lie in the root's folder `.store`, so that the root itself changes only when adapters do:
* `put-*` is a folder being filled, `rm-*` one being deleted: of a dead process, both are rubbish.
* A name says which process it belongs to: whether that is alive is known on its own machine, whatever locks there are.
  What belongs elsewhere is left alone until it is old.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dnd_sdk.files import is_old, replacing
from dnd_sdk.machine import is_alive, process_space

log = logging.getLogger(__name__)

STATE = ".store"
PUTTING, REMOVING = "put-", "rm-"
_EARLIER = "set-"
"""What earlier versions staged files under."""
_OWNED = re.compile(r"(put|rm)-(?P<space>[0-9a-f]{8})-(?P<pid>\d{1,9})-")


def temporary(prefix: str) -> str:
    """A name nobody else uses, that says whose it is."""
    return f"{prefix}{process_space()}-{os.getpid()}-{uuid.uuid4().hex}"


def entries_of(state: Path) -> list[str]:
    """What is not finished, and the journal; empty where there is no such folder."""
    try:
        return os.listdir(state)
    except (FileNotFoundError, NotADirectoryError):
        return []


def sweep_state(state: Path) -> None:
    """Delete what killed processes left; raises `OSError`."""
    for name in entries_of(state):
        path = state / name
        if name.startswith((PUTTING, REMOVING, _EARLIER)) and _is_left(path):
            log.info("removing %s, left by a process that died", path)
            delete(path)


def _is_left(path: Path) -> bool:
    match = _OWNED.match(path.name)
    if match is not None and match["space"] == process_space():
        return not is_alive(int(match["pid"]))
    return is_old(path)


def delete(path: Path) -> None:
    """Remove a file, link or folder, as far as it goes."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


class Opened:
    """A folder as it was opened: files moved into it come into this one, or nowhere, whatever has its name by then."""

    def __init__(self, path: Path, file: int | None) -> None:
        """`file` is its descriptor; None: this system has none for folders."""
        self.path, self._file = path, file

    @property
    def is_in_place(self) -> bool:
        """Whether it still is where it was opened."""
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        return self._file is None or os.path.samestat(there, os.fstat(self._file))

    def take(self, source: Path) -> None:
        """Move a file into it, over the one of that name; raises `FileNotFoundError` when the folder is gone."""
        try:
            if self._file is None:
                os.replace(source, self.path / source.name)
            else:
                os.replace(source, source.name, dst_dir_fd=self._file)
        except OSError as e:
            if e.errno != errno.EXDEV:
                raise
            with replacing(self.path / source.name) as copy:  # the adapter's folder is a link to another disk
                shutil.copyfile(source, copy)


@contextmanager
def opened(folder: Path) -> Iterator[Opened]:
    """Open a folder to move files into; raises `OSError`."""
    if os.rename not in os.supports_dir_fd:  # Windows
        os.stat(folder)
        yield Opened(folder, None)
        return
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        yield Opened(folder, file)
    finally:
        os.close(file)
