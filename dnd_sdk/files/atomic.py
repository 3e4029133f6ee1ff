"""Writing so that a crash or a full disk leaves the old content or the new, and telling disk trouble from the rest."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dnd_sdk.errors import DndError, StorageError
from dnd_sdk.files.locks import reach

_FULL = "free some disk space, or choose another home with --home or DND_HOME; nothing half-written was left"
_IN_THE_WAY = "a file stands where a folder should: move it, or choose another home with --home or DND_HOME"
_FIXES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "free some of your disk quota, then try again; nothing half-written was left",
    errno.EROFS: "the disk is read-only: choose a writable home with --home or DND_HOME",
    errno.EACCES: "no permission: choose a writable home with --home or DND_HOME",
    errno.EPERM: "no permission: choose a writable home with --home or DND_HOME",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EIO: "check the disk: it fails to read or write",
    errno.EFBIG: "choose a home on a disk that takes larger files, with --home or DND_HOME",
}
"""What helps, by what only a disk and its permissions say."""
STALE_S = 3600.0
"""Where nobody can tell whether its process is alive, something unfinished this old belongs to one that died."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")
"""The names that `replacing` writes to."""


@contextmanager
def storage_errors(doing: str, path: Path, *, all_os_errors: bool = True) -> Iterator[None]:
    """Turn the disk's errors inside the block into a `StorageError`: what was being done, where, and what helps.

    Every `OSError` is one, and what libraries say of a full disk in text alone. `all_os_errors` False: only those that
    nothing but a disk raises, for code that raises `OSError` over much else.
    """
    try:
        yield
    except DndError:
        raise
    except Exception as e:
        number = errno.ENOSPC if _says_full(e) else getattr(e, "errno", None)
        if number not in _FIXES and not (all_os_errors and isinstance(e, OSError)):
            raise
        fix = _FIXES.get(number or 0, "check the disk and the folder's permissions")
        raise StorageError(f"cannot {doing} {path}: {getattr(e, 'strerror', None) or e}", fix=fix) from e


def _says_full(error: Exception) -> bool:
    # safetensors reports the system's error as text only
    return any(words in str(error) for words in ("No space left", "os error 28"))


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


def sweep(folder: Path, alone: bool) -> None:
    """Remove what `replacing` left in a folder when its process was killed; `alone` as for `is_left`."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file() and is_left(path, alone):
            path.unlink(missing_ok=True)


def is_left(path: Path, alone: bool) -> bool:
    """Whether nobody is at work on something that only holders of its folder's lock are; `alone`: the caller is."""
    return (alone and reach(path.parent) == "everybody") or is_old(path)


def is_old(path: Path) -> bool:
    """Whether so much time has passed that whoever was at work on it is dead."""
    try:
        return time.time() - path.lstat().st_mtime > STALE_S
    except OSError:
        return False
