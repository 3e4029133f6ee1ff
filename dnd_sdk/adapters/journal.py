"""`Journal`: what was added to the store and taken out of it, one JSON line each, folded now and then.

* A cache of the folders, never the truth: what does not read as expected is thrown away and written anew.
* A line also holds the root folder's time after the change. As long as the root still has the time of the last line,
  nobody added, removed or renamed a folder since: two `stat` calls tell, however many adapters there are.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dnd_sdk.adapters.adapter import Adapter, adapter_fields, adapter_from, check_name
from dnd_sdk.errors import DndError, StorageError
from dnd_sdk.files import locked, write_atomic

log = logging.getLogger(__name__)

FILE = "journal.jsonl"
FORMAT_VERSION = 1
MAX_BYTES = 2**28
_SPARE = 256
"""Lines that may be there beyond twice the adapters before the journal is folded."""

Signature = tuple[int, int, int]
"""Modification time (ns), size and inode of a `dnd.json`: when they differ, another one was written."""


class Entry(NamedTuple):
    """An adapter as its manifest was read, and of which file."""

    adapter: Adapter
    signature: Signature


class News(NamedTuple):
    """What the journal says since it was last read."""

    entries: dict[str, Entry | None]
    """By name; None: removed."""
    everything: bool
    """Whether these are all there are."""


class Journal:
    """The journal of the folders under `root`, in the folder `state`; whoever reads or writes holds `locked`."""

    def __init__(self, root: Path, state: Path) -> None:
        self._root, self._path = root, state / FILE
        self._root_time: int | None = None
        self._place: tuple[int, int] | None = None
        """The journal's inode and how far it was read; None: not at all."""
        self._first = b""
        """Its first line, which tells one file from the next: inodes are used again."""
        self._n_lines = 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep everybody else from adding and removing folders and from writing lines."""
        if self._root.is_dir():
            try:
                self._path.parent.mkdir(exist_ok=True)
            except OSError as e:  # a read-only disk can still be read
                log.debug("no journal in %s: %s", self._path.parent, e.strerror)
        with locked(self._path.parent):
            yield

    @property
    def is_current(self) -> bool:
        """Whether nothing changed since the last `read`, `mark` and `write`, as far as the root and the file tell."""
        return self._root_time is not None and self._root_time == self._time() and self._place == self._end()

    def read(self) -> News:
        """What others wrote since; nothing where there is no usable journal. `is_current` tells if that was all."""
        end = self._end()
        if end is None or end == self._place:
            return News({}, False)
        try:
            return self._read()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, DndError) as e:
            log.warning("%s is not usable (%s), it is written again", self._path, str(e)[:200])
            self._place, self._root_time = None, None
            return News({}, False)

    def mark(self) -> None:
        """Give the root a time of its own, which any change by others then replaces."""
        now = time.time_ns()  # finer than what the system stamps: no two changes share a tick
        try:
            os.utime(self._root, ns=(now, now))
        except OSError as e:  # missing, or somebody else's: then its own time must do
            log.debug("cannot mark %s: %s", self._root, e.strerror)
        self._root_time = self._time()

    def write(self, names: Sequence[str], entries: Mapping[str, Entry]) -> None:
        """Add what `entries` now say of these names, or fold all of them into a new file where that is shorter.

        What cannot be written is found out by the next reader.
        """
        try:
            if self._place is None or self._n_lines + len(names) > 2 * len(entries) + _SPARE:
                self._fold(entries)
            else:
                self._append([self._line(name, entries.get(name)) for name in names] or [{"root": self._root_time}])
        except (OSError, StorageError) as e:
            log.debug("%s is not kept: %s", self._path, e)
        self._place = self._end()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        with self._path.open("ab") as f:
            f.write(b"".join(map(_encoded, lines)))
        self._n_lines += len(lines)

    def _fold(self, entries: Mapping[str, Entry]) -> None:
        first = _encoded({"format_version": FORMAT_VERSION, "id": uuid.uuid4().hex})
        lines = [*(self._line(name, entry) for name, entry in entries.items()), {"root": self._root_time}]
        write_atomic(self._path, first + b"".join(map(_encoded, lines)))
        self._first, self._n_lines = first, 1 + len(lines)

    def _line(self, name: str, entry: Entry | None) -> dict[str, Any]:
        line = {"name": name, "root": self._root_time}
        return line if entry is None else line | {"file": entry.signature, "adapter": adapter_fields(entry.adapter)}

    def _read(self) -> News:
        with self._path.open("rb") as f:
            inode, first = os.fstat(f.fileno()).st_ino, f.readline(MAX_BYTES)
            anew = self._place is None or first != self._first
            if self._place is not None and not anew:
                f.seek(self._place[1])
            data = f.read(MAX_BYTES + 1)
            end = f.tell()
        if len(data) > MAX_BYTES or not (first + data).endswith(b"\n"):
            raise ValueError("its last line is cut")
        if anew and json.loads(first)["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its first line is {first[:80]!r}")
        lines = [json.loads(line) for line in data.splitlines()]
        entries = dict(self._parsed(line) for line in lines if "name" in line)
        self._root_time = int(lines[-1]["root"])
        self._first, self._n_lines = first, len(lines) + (1 if anew else self._n_lines)
        self._place = inode, end
        return News(entries, anew)

    def _parsed(self, line: dict[str, Any]) -> tuple[str, Entry | None]:
        name = check_name(line["name"])
        if "adapter" not in line:
            return name, None
        modified, size, inode = map(int, line["file"])
        return name, Entry(adapter_from(self._root / name, line["adapter"]), (modified, size, inode))

    def _end(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_ino, status.st_size

    def _time(self) -> int | None:
        try:
            return os.stat(self._root).st_mtime_ns
        except OSError:
            return None


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"
