"""Writing so that a crash or a full disk leaves the old content or the new, and telling disk trouble from the rest."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dnd_sdk.errors import DndError, StorageError

_FIXES = {
    errno.ENOSPC: "free some disk space, then try again; nothing half-written was left",
    errno.EDQUOT: "free some of your disk quota, then try again; nothing half-written was left",
    errno.EROFS: "the disk is read-only: choose a writable home with --home or DND_HOME",
    errno.EACCES: "no permission: choose a writable home with --home or DND_HOME",
    errno.EPERM: "no permission: choose a writable home with --home or DND_HOME",
}
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")
"""The names that `replacing` writes to."""


@contextmanager
def storage_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn any `OSError` inside the block into a `StorageError` saying what was being done, where, and what helps."""
    try:
        yield
    except DndError:
        raise
    except OSError as e:
        fix = _FIXES.get(e.errno or 0, "check the disk and the folder's permissions")
        raise StorageError(f"cannot {doing} {path}: {e.strerror or e}", fix=fix) from e


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write a file to, which then replaces `path`; after an error `path` is as it was.

    Raises what the block raises, and `OSError`.
    """
    # not mkstemp: its files are readable by their owner only, and a generator folder is made to be passed on
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` with `data` (text as UTF-8), creating its folder; raises `StorageError`."""
    with storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def sweep(folder: Path) -> None:
    """Remove what `replacing` left in a folder when its process was killed; only while nobody else writes there."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
