"""`Catalogue`: the sound adapters under a root, by name, and what changed among them since somebody last asked.

* Asking for changes costs what changed: they are noticed by the journal and the root's time (see `journal`).
* A full look compares every manifest file with the one that was read, and reads those that are others.
* Where locks do not reach everybody who may write, what another machine did can be missed, never what is stored: there
  a full look is taken every `LOOK_S`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dnd_sdk.adapters.adapter import MANIFEST, Adapter, check_name, read_manifest
from dnd_sdk.adapters.journal import Entry, Journal, Signature
from dnd_sdk.errors import DndError, StorageError
from dnd_sdk.files import reach, storage_errors

log = logging.getLogger(__name__)

LOOK_S = 60.0
"""Seconds between full looks that nothing gives cause for, at least."""
LOOK_SHARE = 0.01
"""Of a process's time that they take, at most."""
REMEMBERED = 4096
"""Changes kept for those who ask; whoever comes later than that is told everything."""


@dataclass(frozen=True)
class Changes:
    """What is different since an earlier question."""

    now: int
    """To be given with the next question."""
    adapters: dict[str, Adapter | None]
    """By name; None: removed."""
    everything: bool
    """Whether these are all adapters there are, and nothing known before counts."""


class Catalogue:
    """Safe to share between threads; damaged folders are skipped with a warning, once each."""

    def __init__(self, root: Path, state: Path) -> None:
        self._root, self._journal = root, Journal(root, state)
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._by_prompts: dict[str | None, set[str]] = {}
        self._by_id: dict[str | None, set[str]] = {}
        self._looked = False
        self._look_at = math.inf
        """When a full look is due, by the monotonic clock."""
        self._warned: set[str] = set()
        self._now = 0
        self._recent: deque[str] = deque(maxlen=REMEMBERED)
        """Names of the latest changes, the last at the right; as many were counted by `_now`."""

    def adapters(self) -> list[Adapter]:
        """Every sound adapter by name, from a full look; raises `StorageError` when the root cannot be listed."""
        with self._refreshed(full=True):
            return [self._entries[name].adapter for name in sorted(self._entries)]

    def changes(self, since: int) -> Changes:
        """What changed after the question that was answered with `now=since`; 0 for everything there is."""
        with self._refreshed():
            missed = self._now - since
            if since <= 0 or not 0 <= missed <= len(self._recent):
                return Changes(self._now, {name: e.adapter for name, e in self._entries.items()}, True)
            names = dict.fromkeys(self._recent[-i] for i in range(1, missed + 1))
            return Changes(self._now, {n: e and e.adapter for n in names for e in [self._entries.get(n)]}, False)

    def made_for(self, prompt_hash: str) -> list[Adapter]:
        """The adapters made for a prompt set, by name."""
        with self._refreshed():
            return self._named(self._by_prompts, prompt_hash)

    def with_id(self, adapter_id: str) -> list[Adapter]:
        """The adapters of these weights, by name."""
        with self._refreshed():
            return self._named(self._by_id, adapter_id)

    @contextmanager
    def changing(self) -> Iterator[Callable[[str, Adapter | None], None]]:
        """Keep others from changing the root; call what this yields as soon as something is there, or (None) gone."""
        with self._lock, self._journal.locked():
            with self._whole():
                self._catch_up()
            yield self._record

    def _record(self, name: str, adapter: Adapter | None) -> None:
        with self._whole():
            self._journal.mark()
            signature = _signature(self._root, name)
            self._set(name, None if adapter is None or signature is None else Entry(adapter, signature))
            self._warned.discard(name)
            self._journal.write([name], self._entries)

    @contextmanager
    def _refreshed(self, *, full: bool = False) -> Iterator[None]:
        """Hold what is known, brought up to date; a process's first look is a full one."""
        with self._lock:
            full = full or not self._looked or time.monotonic() >= self._look_at
            if full or not self._journal.is_current:
                with self._journal.locked(), self._whole():
                    self._looked = True
                    self._catch_up(full)
            yield

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Know nothing, and look at everything next time, if what is inside was cut short: by Ctrl-C, by the disk."""
        try:
            yield
        except BaseException:
            self._looked = False
            self._journal.forget()
            for known in (self._entries, self._by_prompts, self._by_id, self._recent):
                known.clear()
            self._now += 1
            raise

    def _catch_up(self, full: bool = False) -> None:
        news = self._journal.read()
        if news.everything:
            for name in self._entries.keys() - news.entries.keys():
                self._set(name, None)
        for name, entry in news.entries.items():
            # also what came and went meanwhile: others may have kept something of it
            self._set(name, entry, told=not news.everything)
        clean = self._journal.is_current
        if clean and not full:
            return
        if not clean:
            self._journal.mark()  # before the look: what is changed during it is seen at the next question
        changed = self._look()
        if changed or not clean:
            self._journal.write(changed, self._entries)

    def _look(self) -> list[str]:
        """Compare all folders with what is known; the names of those that differed."""
        start = time.monotonic()
        changed = self._compare()
        now = time.monotonic()
        wait_s = max(LOOK_S, (now - start) / LOOK_SHARE)
        self._look_at = math.inf if reach(self._root) == "everybody" else now + wait_s
        return changed

    def _compare(self) -> list[str]:
        names = set(folder_names(self._root))
        differ = [n for n, e in self._entries.items() if n not in names or _signature(self._root, n) != e.signature]
        found = {n: self._read(n) for n in (*differ, *sorted(names - self._entries.keys()))}
        changed = [n for n, entry in found.items() if entry is not None or n in self._entries]
        for name in changed:
            self._set(name, found[name])
        return changed

    def _read(self, name: str) -> Entry | None:
        folder = self._root / name
        try:
            check_name(name)
            signature = _signature(self._root, name)  # before the reading: a later one may be of another file
            adapter = read_manifest(folder)
            return None if signature is None else Entry(adapter, signature)
        except DndError as e:
            if isinstance(e, StorageError):  # no damage: the disk, or too many open files, may do better next time
                self._looked = False
            if name not in self._warned and os.path.lexists(folder):
                self._warned.add(name)
                log.warning("skipping damaged adapter folder %r: %s", name, e.message)
            return None

    def _set(self, name: str, entry: Entry | None, *, told: bool = False) -> None:
        old = self._entries.pop(name, None)
        if entry is not None:
            self._entries[name] = entry
        if old == entry and not told:
            return
        self._now += 1
        self._recent.append(name)
        for names, key in ((self._by_prompts, "prompt_hash"), (self._by_id, "id")):
            if old is not None:
                _take_out(names, getattr(old.adapter, key), name)
            if entry is not None:
                names.setdefault(getattr(entry.adapter, key), set()).add(name)

    def _named(self, names: dict[str | None, set[str]], key: str) -> list[Adapter]:
        return [self._entries[name].adapter for name in sorted(names.get(key, ()))]


def _take_out(names: dict[str | None, set[str]], key: str | None, name: str) -> None:
    names[key].discard(name)
    if not names[key]:
        del names[key]


def folder_names(root: Path) -> list[str]:
    """Every entry but dot names, whatever it holds; raises `StorageError` when the root cannot be listed."""
    with storage_errors("list", root):
        try:
            return [n for n in os.listdir(root) if not n.startswith(".")]
        except FileNotFoundError:
            return []


def _signature(root: Path, name: str) -> Signature | None:
    try:
        status = os.stat(f"{root}/{name}/{MANIFEST}")  # of thousands: making paths would take longer than looking
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
