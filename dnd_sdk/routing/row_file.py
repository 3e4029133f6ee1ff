"""`RowFile`: rows of float32 in a file that is only ever added to, read a few at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dnd_sdk.files import plain_only


class RowFile:
    """Rows (C,) one after the other; stays readable when the file is removed. Safe to share."""

    def __init__(self, path: Path, width: int) -> None:
        """Opens the file; raises `OSError`."""
        self.path, self._width = path, width
        self._file = open(path, "rb", buffering=0, opener=plain_only)  # noqa: SIM115
        self._seeking = threading.Lock()

    def __len__(self) -> int:
        return os.fstat(self._file.fileno()).st_size // (4 * self._width)

    def has(self, n_rows: int) -> bool:
        """Whether the file still is where it was opened and has that many rows."""
        try:
            in_place = os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except OSError:
            return False
        return in_place and len(self) >= n_rows

    def read(self, start: int, count: int) -> np.ndarray:
        """Rows (count, C) from number `start` on; raises `ValueError` where they are not there."""
        data = self._bytes(4 * self._width * start, 4 * self._width * count)
        if len(data) != 4 * self._width * count:
            raise ValueError(f"{self.path} ends before row {start + count}")
        return np.frombuffer(data, np.float32).reshape(count, self._width)

    def _bytes(self, offset: int, n: int) -> bytearray:
        data = bytearray(n)  # writable, as torch wants what it makes tensors of
        if hasattr(os, "preadv"):  # a forked process shares the file's position
            n_read = os.preadv(self._file.fileno(), [data], offset)
        else:
            with self._seeking:
                self._file.seek(offset)
                n_read = self._file.readinto(data)
        return data[:n_read]


def append_rows(path: Path, blocks: Iterable[np.ndarray], width: int) -> list[tuple[int, int]]:
    """Add blocks of rows at the end of a file, made if missing; each one's first row and how many there are.

    Part of a row at the end, left by a killed process, is cut off. Raises `OSError`.
    """
    with path.open("ab") as f:
        size = f.seek(0, os.SEEK_END)
        at = size // (4 * width)
        if size % (4 * width):
            f.truncate(4 * width * at)
            f.seek(0, os.SEEK_END)
        places = []
        for block in blocks:
            places.append((at, len(block)))
            f.write(np.ascontiguousarray(block, np.float32).data)
            at += len(block)
    return places
