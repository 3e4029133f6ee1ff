"""Reading files that may be damaged or hostile.

Every size is bounded before memory is taken; links that leave the folder, pipes and devices are refused.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from dnd_sdk.errors import AdapterCorruptError
from dnd_sdk.files.atomic import storage_errors


@contextmanager
def open_regular(folder: Path, name: str, max_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open `folder/name` for reading and yield it with its size.

    Raises `AdapterCorruptError` when it is missing, leaves the folder through a link, is not a plain file or is larger
    than `max_bytes`; `StorageError` when the disk refuses.
    """
    path = folder / name
    with storage_errors("read", path), open(_plain_file(folder, path, max_bytes), "rb") as f:
        yield f, os.fstat(f.fileno()).st_size


def _plain_file(folder: Path, path: Path, max_bytes: int) -> Path:
    real, status = _found(folder, path)
    # judged before opening: opening a pipe would wait for ever
    if not stat.S_ISREG(status.st_mode):
        raise AdapterCorruptError(f"{path} is not a plain file")
    if status.st_size > max_bytes:
        raise AdapterCorruptError(
            f"{path} has {status.st_size} bytes, at most {max_bytes} are allowed",
            fix="use an adapter made for this base model, saved as plain LoRA",
        )
    return real


def _found(folder: Path, path: Path) -> tuple[Path, os.stat_result]:
    """The file that `path` means, a link followed as long as it stays in `folder`."""
    try:
        status = path.lstat()
        if not stat.S_ISLNK(status.st_mode):
            return path, status
        real = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise AdapterCorruptError(f"{path} is missing", fix="copy the adapter's folder again, all of it") from e
    except RuntimeError as e:  # how Python before 3.13 reports a loop of links
        raise AdapterCorruptError(f"{path} is a loop of links") from e
    if not real.is_relative_to(folder.resolve()):
        raise AdapterCorruptError(f"{path} is a link that leaves its folder", fix="copy the file into its place")
    return real, real.stat()


def plain_only(path: str, flags: int) -> int:
    """An `opener` for `open`; raises `OSError` for a pipe or a device, which might be waited for for ever."""
    file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise OSError(errno.EINVAL, "not a plain file", path)


def read_json(folder: Path, name: str, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object of bounded size; raises like `open_regular`, and `AdapterCorruptError` on anything else."""
    with open_regular(folder, name, max_bytes) as (f, _):
        raw = f.read(max_bytes + 1)
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise AdapterCorruptError(f"{folder / name} is not valid JSON: {str(e)[:200]}") from e
    if not isinstance(data, dict):
        raise AdapterCorruptError(f"{folder / name} holds a JSON {type(data).__name__}, expected an object")
    return data


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value read from JSON is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
