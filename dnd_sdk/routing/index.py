"""`AdapterIndex`: which stored adapters were made for prompts like these.

* Adapters are known by name: that is what users see, and two of the same weights may have other prompts each.
* An adapter made under a role is compared with prompts of that role alone.
* Of many adapters those with the nearest centres are compared with every prompt, exactly; of few, all (see `centres`).
* Kept in a folder, vectors are read from there when they are needed; without one, or on a full disk, all are in memory.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dnd_sdk.adapters import Adapter, Changes
from dnd_sdk.errors import AdapterNotFoundError, ConfigError, DndError, StorageError
from dnd_sdk.routing.centres import Centres
from dnd_sdk.routing.similarity import check_vectors, choose_exemplars, coherence, set_similarity
from dnd_sdk.routing.vector_file import Kept, Key, VectorFile, Vectors

log = logging.getLogger(__name__)

MAX_QUERY = 128
"""Prompts of a set that are compared; of a larger set an even sample."""
COMPARED = 32
"""Adapters that are compared prompt by prompt."""
AT_HAND = 1024
"""Adapters whose exemplars stay in memory once they were read."""
_NO_DIRECTION = 1e-6


class Store(Protocol):
    """What routing needs of an `AdapterStore`."""

    def changes(self, since: int) -> Changes: ...  # noqa: D102
    def exemplars(self, adapter: Adapter) -> Tensor | None: ...  # noqa: D102


class Hit(NamedTuple):
    """An adapter and how well it fits."""

    name: str
    score: float
    adapter: Adapter | None = None
    """As it was when it was compared; None: put in with `add`."""


class DamagedIndex(Exception):
    """Vectors on disk are not as they were written: `AdapterIndex.forget`, then `sync`."""


class _Known(NamedTuple):
    """What is known of an adapter in the index."""

    role: str | None
    stamp: str
    adapter: Adapter | None

    @classmethod
    def of(cls, adapter: Adapter) -> _Known:
        parts = (adapter.id, adapter.created, adapter.refined, adapter.exemplars_sha256)
        return cls(adapter.role, " ".join(part for part in parts if part), adapter)


class _Owner(NamedTuple):
    """Whose centre it is."""

    name: str
    vectors: Vectors | Kept
    adapter: Adapter | None


class AdapterIndex:
    """Exemplars of the adapters of one base and encoder; every method may be called from any thread."""

    def __init__(
        self, key: Key, folder: Path | None = None, *, usable: Callable[[Adapter], bool] = lambda adapter: True
    ) -> None:
        """`folder` is where vectors are kept between runs, None: nowhere; `usable` says which adapters may be found."""
        if key.width < 1:
            raise ConfigError(f"index width must be at least 1, got {key.width}")
        self.key = key
        self._file = None if folder is None else VectorFile(folder, key)
        self._usable = usable
        self._write = threading.Lock()
        self._since = 0
        self._edition: object = None
        self._known: dict[str, _Known] = {}
        self._centres: dict[str | None, Centres[_Owner]] = {}
        """By role."""
        self._at_hand: OrderedDict[Kept, Tensor] = OrderedDict()
        self._handling = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters in the index."""
        with self._write:
            return tuple(self._known)

    def add(self, name: str, vectors: Tensor, *, role: str | None = None) -> None:
        """Add an adapter with its exemplars `(k, C)`, in memory.

        Raises `InputError` unless they are finite, normalised and of the index's width, `ConfigError` if the adapter is
        there already.
        """
        vectors = check_vectors(vectors, self.key.width)
        with self._write:
            if name in self._known:
                raise ConfigError(f"adapter {name!r} is in the index already", fix="remove it first")
            self._change({name: (_Known(role, "", None), _vectors("", vectors))}, set())

    def remove(self, name: str) -> None:
        """Remove an adapter; raises `AdapterNotFoundError`."""
        with self._write:
            if name not in self._known:
                raise AdapterNotFoundError(f"adapter {name!r} is not in the index")
            self._change({}, {name})

    def score(self, vectors: Tensor, role: str | None = None) -> list[Hit]:
        """The adapters of a role nearest to the prompt set `(n, C)`, by `similarity` to their exemplars, best first.

        At most `COMPARED`. Raises `DamagedIndex` when vectors on disk are not as they were written.
        """
        query = choose_exemplars(check_vectors(vectors, self.key.width), MAX_QUERY)
        centres = self._centres.get(role)
        near = [] if centres is None else centres.view.nearest(_centre(query).numpy(), COMPARED)
        own = coherence(query)
        hits = [
            Hit(name, set_similarity(query, self._exemplars(v), coherence_a=own, coherence_b=v.coherence), adapter)
            for name, v, adapter in near
        ]
        return sorted(hits, key=lambda h: (-h.score, h.name))

    def sync(self, store: Store) -> bool:
        """Take in what changed in the store since the last time; returns whether anything had.

        Adapters of another base or encoder and adapters without usable exemplars are left out.
        """
        with self._write:
            changes = store.changes(self._since)
            if not changes.adapters and not (changes.everything and (self._known or self._is_unread)):
                return False
            try:
                self._since = self._take_in(store)
            except BaseException:  # Ctrl-C: what was half done is done again from the beginning
                self._forget()
                raise
        return True

    @property
    def _is_unread(self) -> bool:
        """Whether there is a file that may still have what the store has not."""
        return self._file is not None and self._file.is_unread

    def forget(self) -> None:
        """Have everything read again at the next `sync`, also from disk."""
        with self._write:
            self._forget()

    def _forget(self) -> None:
        self._known, self._centres, self._since = {}, {}, 0
        if self._file is not None:
            self._file.forget()

    def _take_in(self, store: Store) -> int:
        try:
            return self._sync_file(self._file, store)
        except StorageError as e:  # a cache: a full or read-only disk must not stop routing
            log.warning("the adapter index is not kept: %s", e.message)
            self._file = None
            return self._follow(store)

    def _sync_file(self, file: VectorFile | None, store: Store) -> int:
        if file is None:
            return self._follow(store)
        with file.locked():
            file.read()
            try:
                return self._follow(store)
            except StorageError:
                raise
            except (OSError, ValueError) as e:
                log.warning("the adapter index is damaged (%s), it is made again", str(e)[:200])
                self._forget()  # all of it, or the new file would hold the latest changes alone
                return self._follow(store)

    def _follow(self, store: Store) -> int:
        """Know what the store has now, and write it down; vectors come from the file where those are up to date.

        Returns what to ask the store with the next time.
        """
        changes = store.changes(self._since)  # asked while nobody else writes the file
        wanted = {n: _Known.of(a) for n, a in changes.adapters.items() if a is not None and self._accepts(a)}
        gone = (self._known if changes.everything else changes.adapters).keys() - wanted.keys()
        fresh = {n: known for n, known in wanted.items() if not self._has(n, known)}
        kept = {} if self._file is None else self._file.kept
        found: dict[str, Vectors | Kept] = {n: kept[n] for n, k in fresh.items() if _is_of(kept.get(n), k)}
        made = {n: v for n, k in fresh.items() if n not in found and (v := self._read(store, k)) is not None}
        found |= made if self._file is None else self._written(self._file, made, changes, wanted)
        self._change({n: (fresh[n], v) for n, v in found.items()}, gone | (fresh.keys() - found.keys()))
        self._let_go(found.keys())
        return changes.now

    def _has(self, name: str, known: _Known) -> bool:
        """Whether an adapter is here as it is now, and in the file where there is one."""
        return known == self._known.get(name) and (self._file is None or _is_of(self._file.kept.get(name), known))

    def _let_go(self, current: Set[str]) -> None:
        """Once all was written anew, read all but the `current` from there: what was before takes disk while open."""
        if self._file is None or self._file.edition == self._edition:
            return
        kept = self._file.kept
        moved = {n: (k, kept[n]) for n, k in self._known.items() if n not in current and _is_of(kept.get(n), k)}
        self._change(moved, set())
        if self._edition is not None:
            with self._handling:
                self._at_hand.clear()
        self._edition = self._file.edition

    def _written(
        self, file: VectorFile, made: Mapping[str, Vectors], changes: Changes, wanted: Mapping[str, _Known]
    ) -> dict[str, Kept]:
        """Add to the file what was made, take out what the store has no more."""
        gone = []
        for n in file.kept.keys() if changes.everything else file.kept.keys() & changes.adapters.keys():
            adapter = changes.adapters.get(n)  # one that this session cannot use may be another's
            known = wanted.get(n) or (None if adapter is None else _Known.of(adapter))
            if known is None or not _is_of(file.kept[n], known):
                gone.append(n)
        file.write(made, gone)
        added = {n: file.kept[n] for n in made}
        for n, kept in added.items():
            self._keep_at_hand(kept, torch.from_numpy(made[n].exemplars))
        return added

    def _change(self, add: Mapping[str, tuple[_Known, Vectors | Kept]], remove: Set[str]) -> None:
        """Add adapters, replacing those of the same names, and remove others."""
        out: dict[str | None, set[str]] = {}
        for name in (remove | add.keys()) & self._known.keys():
            out.setdefault(self._known[name].role, set()).add(name)
        by_role: dict[str | None, dict[str, tuple[np.ndarray, _Owner]]] = {}
        for name, (known, vectors) in add.items():
            by_role.setdefault(known.role, {})[name] = vectors.centre, _Owner(name, vectors, known.adapter)
        for role in out.keys() | by_role.keys():
            self._change_role(role, by_role.get(role, {}), out.get(role, set()))
        for name in remove:
            self._known.pop(name, None)
        self._known.update((name, known) for name, (known, _) in add.items())

    def _change_role(self, role: str | None, add: dict[str, tuple[np.ndarray, _Owner]], remove: set[str]) -> None:
        centres = self._centres.get(role)
        if centres is None:
            centres = self._centres[role] = Centres(self.key.width)
        centres.change(add, remove - add.keys())
        if not centres.view.n_live:
            del self._centres[role]

    def _accepts(self, adapter: Adapter) -> bool:
        fits = (adapter.base_fingerprint, adapter.encoder_fingerprint) == (
            self.key.base_fingerprint,
            self.key.encoder_fingerprint,
        )
        return fits and self._usable(adapter)

    def _read(self, store: Store, known: _Known) -> Vectors | None:
        assert known.adapter is not None
        try:
            found = store.exemplars(known.adapter)
            return None if found is None else _vectors(known.stamp, check_vectors(found, self.key.width))
        except DndError as e:
            log.warning("adapter %r is left out of routing: %s", known.adapter.name, e.message)
            return None

    def _exemplars(self, vectors: Vectors | Kept) -> Tensor:
        if isinstance(vectors, Vectors):
            return torch.from_numpy(vectors.exemplars)
        with self._handling:
            found = self._at_hand.get(vectors)
            if found is not None:
                self._at_hand.move_to_end(vectors)
                return found
        try:
            read = torch.from_numpy(vectors.exemplars)
        except (OSError, ValueError) as e:
            raise DamagedIndex(str(e)) from e
        self._keep_at_hand(vectors, read)
        return read

    def _keep_at_hand(self, kept: Kept, exemplars: Tensor) -> None:
        with self._handling:
            self._at_hand[kept] = exemplars
            while len(self._at_hand) > AT_HAND:
                self._at_hand.popitem(last=False)


def compare_saved(folder: Path, store: Store) -> tuple[int, int]:
    """How many adapters a saved index has as the store has them, and how many it lacks, has otherwise or too many.

    Raises `ValueError`, `OSError` and the like when the index is damaged. Reads every vector, writes nothing.
    """
    file = VectorFile.found_in(folder)
    index = AdapterIndex(file.key)
    index.sync(store)
    same = {n for n, known in index._known.items() if _is_of(file.kept.get(n), known)}
    for owner in (o for centres in index._centres.values() for o in centres.view.owners if o is not None):
        if owner.name in same and not np.array_equal(file.kept[owner.name].exemplars, owner.vectors.exemplars):
            raise ValueError(f"the vectors of {owner.name!r} are not its exemplars")
    return len(same), len(file.kept.keys() | index._known.keys()) - len(same)


def _is_of(kept: Kept | None, known: _Known) -> bool:
    return kept is not None and kept.stamp == known.stamp


def _vectors(stamp: str, exemplars: Tensor) -> Vectors:
    """What is kept of checked exemplars (k, C)."""
    own = exemplars.clone()  # the caller's may change
    return Vectors(stamp, coherence(own), _centre(own).numpy(), own.numpy())


def _centre(vectors: Tensor) -> Tensor:
    """The direction (C,) of the mean of (n, C); of vectors that cancel out, that of the first."""
    mean = vectors.mean(dim=0)
    norm = mean.norm()
    return mean / norm if norm > _NO_DIRECTION else vectors[0] / vectors[0].norm()
