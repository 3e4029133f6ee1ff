"""`LineLog`: JSON objects, one a line, that several processes add to; folded into a new file now and then.

A cache of something else, never the truth: what does not read as expected is for the caller to write anew.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dnd_sdk.files.atomic import write_atomic
from dnd_sdk.files.untrusted import plain_only

MAX_BYTES = 2**28

Line = Mapping[str, Any]


class LineLog:
    """A file of lines; whoever reads or writes holds the lock of its folder (see `locked`)."""

    def __init__(self, path: Path, header: Line) -> None:
        """`header` begins the file; a file that says otherwise is not read."""
        self.path, self._header = path, header
        self.first: dict[str, Any] = {}
        """The first line of the file as it was last read or written."""
        self.n_lines = 0
        """Lines in the file as far as it was read."""
        self._place: tuple[int, int] | None = None
        """The file's inode and how far it was read; None: not at all."""
        self._last = b""
        """The line that ends there."""

    @property
    def is_new(self) -> bool:
        """Whether there is no file to add lines to: `fold` makes one."""
        return self._place is None

    @property
    def at_end(self) -> bool:
        """Whether nobody wrote since it was last read or written here; one `stat`."""
        return self._place == self._end()

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The lines not read before, and whether they are all that there are and nothing read before counts.

        Raises `ValueError` and `OSError` for a file that cannot be used, which then counts as none.
        """
        if self._place == self._end():
            return [], False
        place, self._place = self._place, None
        with open(self.path, "rb", opener=plain_only) as f:
            inode, first = os.fstat(f.fileno()).st_ino, f.readline(MAX_BYTES)
            anew = place is None or place[0] != inode or _decoded(first) != self.first
            if place is not None and not anew:
                # inodes are used again, and a backup begins alike: what was read last must be there, too
                f.seek(place[1] - len(self._last))
                anew = f.read(len(self._last)) != self._last
            if anew:
                f.seek(len(first))
            data = f.read(MAX_BYTES + 1)
            place = inode, f.tell()
        if len(data) > MAX_BYTES or not (first + data).endswith(b"\n"):
            raise ValueError("its last line is cut")
        if anew:
            self._begin(_decoded(first))
        lines = [_decoded(line) for line in data.splitlines()]
        self.n_lines += len(lines)
        self._place, self._last = place, _last_of(data or (first if anew else self._last))
        return lines, anew

    def append(self, lines: Iterable[Line]) -> None:
        """Add lines; raises `OSError`, and the next reader finds the file cut or short."""
        data = [_encoded(line) for line in lines]
        added = b"".join(data)
        with self.path.open("ab") as f:
            end = os.fstat(f.fileno()).st_ino, f.tell()
            f.write(added)
        if self._place == end:  # else others wrote, whom no lock held off: all that is read on
            self.n_lines += len(data)
            self._place, self._last = (end[0], end[1] + len(added)), data[-1] if data else self._last

    def fold(self, lines: Iterable[Line], **more: Any) -> None:
        """Replace the file by these lines under the header and `more`; raises `StorageError`, the old one is left."""
        first = {**self._header, **more, "id": uuid.uuid4().hex}
        data = [_encoded(line) for line in lines]
        write_atomic(self.path, _encoded(first) + b"".join(data))
        self.first, self.n_lines, self._place = first, len(data), self._end()
        self._last = data[-1] if data else _encoded(first)

    def _begin(self, first: dict[str, Any]) -> None:
        if any(first.get(key) != value for key, value in self._header.items()):
            raise ValueError(f"it begins with {str(first)[:200]}")
        self.first, self.n_lines = first, 0

    def _end(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_ino, status.st_size


def _last_of(data: bytes) -> bytes:
    return data[data.rfind(b"\n", 0, -1) + 1 :]


def _encoded(line: Line) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except RecursionError as e:
        raise ValueError("a line is nested too deep") from e
    if not isinstance(found, dict):
        raise ValueError(f"a line holds a JSON {type(found).__name__}, not an object")
    return found
