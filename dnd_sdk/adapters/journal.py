"""`Journal`: what was added to the store and taken out of it, as lines that every process reads on from.

* A cache of the folders, never the truth: what does not read as expected is thrown away and written anew.
* A line also holds the root folder's time after the change. As long as the root still has the time of the last line,
  nobody added, removed or renamed a folder since: two `stat` calls tell, however many adapters there are.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dnd_sdk.adapters.adapter import Adapter, adapter_fields, adapter_from, check_name
from dnd_sdk.errors import DndError, StorageError
from dnd_sdk.files import LineLog, locked, sweep

log = logging.getLogger(__name__)

FILE = "journal.jsonl"
FORMAT_VERSION = 1
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
        self._root, self._state = root, state
        self._lines = LineLog(state / FILE, {"format_version": FORMAT_VERSION})
        self._root_time: int | None = None
        self._swept = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep everybody else from adding and removing folders and from writing lines."""
        if self._root.is_dir():
            try:
                self._state.mkdir(exist_ok=True)
            except OSError as e:  # a read-only disk can still be read
                log.debug("no journal in %s: %s", self._state, e.strerror)
        with locked(self._state) as alone:
            if not self._swept:
                self._sweep(alone)
            yield

    @property
    def is_current(self) -> bool:
        """Whether nothing changed since the last `read`, `mark` and `write`, as far as the root and the file tell."""
        return self._root_time is not None and self._root_time == self._time() and self._lines.at_end

    def read(self) -> News:
        """What others wrote since; nothing where there is no usable journal. `is_current` tells if that was all."""
        try:
            lines, everything = self._lines.read()
            entries = dict(self._parsed(line) for line in lines if "name" in line)
            if lines:
                self._root_time = int(lines[-1]["root"])
            return News(entries, everything)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, DndError) as e:
            log.warning("%s is not usable (%s), it is written again", self._lines.path, str(e)[:200])
            self.forget()
            return News({}, False)

    def forget(self) -> None:
        """Have all of it looked at and written again."""
        self._lines = LineLog(self._lines.path, {"format_version": FORMAT_VERSION})
        self._root_time = None

    def mark(self) -> None:
        """Give the root a time of its own, which any change by others then replaces."""
        now = time.time_ns()  # finer than what the system stamps: no two changes share a tick
        try:
            os.utime(self._root, ns=(now, now))
        except OSError as e:  # missing, or somebody else's: then its own time must do
            log.debug("cannot mark %s: %s", self._root, e.strerror)
        self._root_time = self._time()

    def write(self, names: Sequence[str], entries: Mapping[str, Entry]) -> None:
        """Add what `entries` now say of these names, or fold all of them into a new file where that is due.

        What cannot be written is found out by the next reader.
        """
        if self._root_time is None:  # no root: nothing to tell of, and nothing is to be made
            return
        last = {"root": self._root_time}
        try:
            if self._lines.is_new or self._lines.n_lines + len(names) > 2 * len(entries) + _SPARE:
                self._lines.fold([*(self._line(name, entry) for name, entry in entries.items()), last])
            else:
                self._lines.append([self._line(name, entries.get(name)) for name in names] or [last])
        except (OSError, StorageError) as e:
            log.debug("%s is not kept: %s", self._lines.path, e)

    def _sweep(self, alone: bool) -> None:
        """Remove what a process left that was killed while it folded the journal."""
        try:
            sweep(self._state, alone)
        except OSError as e:  # a read-only disk can still be read
            log.debug("what a killed process left in %s cannot be cleared: %s", self._state, e.strerror or e)
        self._swept = True

    def _line(self, name: str, entry: Entry | None) -> dict[str, Any]:
        line = {"name": name, "root": self._root_time}
        return line if entry is None else line | {"file": entry.signature, "adapter": adapter_fields(entry.adapter)}

    def _parsed(self, line: dict[str, Any]) -> tuple[str, Entry | None]:
        name = check_name(line["name"])
        if "adapter" not in line:
            return name, None
        modified, size, inode = map(int, line["file"])
        return name, Entry(adapter_from(self._root / name, line["adapter"]), (modified, size, inode))

    def _time(self) -> int | None:
        try:
            return os.stat(self._root).st_mtime_ns
        except OSError:
            return None
