"""`AdapterIndex`: which stored adapters were made for prompts like these.

* FAISS `IndexIDMap2(IndexFlatIP)` over L2-normalised exemplars, several per adapter: exact cosine search with deletes.
* FAISS crashes when one thread writes while another searches, so a published index object is never changed: a writer
  clones it, changes the clone and swaps the reference. Readers take the reference once and need no lock.
* Adapters are known by name: that is what users see, and two of the same weights may have other prompts each.
* FAISS accepts an id twice without a word; labels are therefore handed out here, one contiguous range per adapter.
* On disk the index file is written first and the manifest last; only a manifest whose hash fits the index counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import faiss
import numpy as np
import torch
from torch import Tensor

from dnd_sdk.adapters import Adapter
from dnd_sdk.errors import AdapterNotFoundError, ConfigError, DndError
from dnd_sdk.files import locked, storage_errors, sweep, write_atomic
from dnd_sdk.routing.similarity import check_vectors, choose_exemplars, coherence, set_similarity

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""1 knew adapters by id and kept one of two of the same weights: such an index is built again."""
INDEX_FILE = "index.faiss"
MANIFEST_FILE = "index.json"
MAX_QUERY = 128
"""Prompts of a set that are compared; of a larger set an even sample."""
_NEAREST = 5
"""Each prompt brings at least this many of its nearest adapters into the comparison."""


class Store(Protocol):
    """What routing needs of an `AdapterStore`."""

    def ls(self) -> list[Adapter]: ...  # noqa: D102
    def exemplars(self, adapter: Adapter) -> Tensor | None: ...  # noqa: D102
    def version(self) -> str: ...  # noqa: D102


class Hit(NamedTuple):
    """An adapter and how well it fits."""

    name: str
    score: float


@dataclass(frozen=True)
class Key:
    """What all vectors of one index share; vectors of another key cannot be compared with them."""

    width: int
    encoder: str
    encoder_fingerprint: str
    base_fingerprint: str


@dataclass(frozen=True)
class _Entry:
    """One adapter's exemplars: labels `start` to `start + count`."""

    name: str
    stamp: str
    """Changes when another adapter was stored under the name, or it got other exemplars."""
    start: int
    count: int


@dataclass(frozen=True)
class _Snapshot:
    """One state of the index; nothing in it is ever changed."""

    faiss: Any
    entries: tuple[_Entry, ...] = ()
    """In the order of their labels."""
    next_label: int = 0
    store_version: str | None = None
    """Of the store this state was read from; None: not read from one, or changed since."""

    def owners(self, labels: np.ndarray) -> np.ndarray:
        """The entry number of each label."""
        starts = np.fromiter((e.start for e in self.entries), np.int64, len(self.entries))
        return np.searchsorted(starts, labels, side="right") - 1

    def vectors(self, entry: _Entry) -> Tensor:
        """The exemplars `(count, C)` of one entry."""
        labels = np.arange(entry.start, entry.start + entry.count, dtype=np.int64)
        return torch.from_numpy(self.faiss.reconstruct_batch(labels))


class AdapterIndex:
    """Exemplars of the adapters of one base and encoder; every method may be called from any thread."""

    def __init__(self, key: Key) -> None:
        if key.width < 1:
            raise ConfigError(f"index width must be at least 1, got {key.width}")
        self.key = key
        self._snapshot = _Snapshot(faiss.IndexIDMap2(faiss.IndexFlatIP(key.width)))
        self._write = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters in the index."""
        return tuple(e.name for e in self._snapshot.entries)

    def add(self, name: str, vectors: Tensor, *, stamp: str = "") -> None:
        """Add an adapter with its exemplars `(k, C)`.

        Raises `InputError` unless they are finite, normalised and of the index's width, `ConfigError` if the adapter is
        there already.
        """
        vectors = check_vectors(vectors, self.key.width)
        with self._write:
            if name in self.names:
                raise ConfigError(f"adapter {name!r} is in the index already", fix="remove it first")
            self._snapshot = _changed(self._snapshot, add={name: (stamp, vectors)})

    def remove(self, name: str) -> None:
        """Remove an adapter; raises `AdapterNotFoundError`."""
        with self._write:
            if name not in self.names:
                raise AdapterNotFoundError(f"adapter {name!r} is not in the index")
            self._snapshot = _changed(self._snapshot, remove={name})

    def search(self, vectors: Tensor, k: int) -> list[list[Hit]]:
        """For each of the `(n, C)` vectors its `k` nearest exemplars (fewer if there are fewer), best first."""
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        snapshot = self._snapshot
        scores, owners = _search(snapshot, check_vectors(vectors, self.key.width), k)
        names = [e.name for e in snapshot.entries]
        return [
            [Hit(names[o], float(s)) for o, s in zip(row_o, row_s, strict=True)]
            for row_o, row_s in zip(owners, scores, strict=True)
        ]

    def score(self, vectors: Tensor) -> list[Hit]:
        """Adapters near the prompt set `(n, C)` by `similarity` to their exemplars, best first.

        Every adapter among the five nearest of any prompt is compared, exactly; the others are left out.
        """
        snapshot = self._snapshot
        query = choose_exemplars(check_vectors(vectors, self.key.width), MAX_QUERY)
        if not snapshot.entries:
            return []
        # enough hits that even adapters whose exemplars are all closer cannot crowd out the fifth
        k = _NEAREST * max(e.count for e in snapshot.entries)
        near = [snapshot.entries[i] for i in np.unique(_search(snapshot, query, k)[1])]
        own = coherence(query)
        hits = [Hit(e.name, set_similarity(query, snapshot.vectors(e), coherence_a=own)) for e in near]
        return sorted(hits, key=lambda h: (-h.score, h.name))

    def sync(self, store: Store) -> bool:
        """Take in what changed in the store since the last time; returns whether anything was read.

        Adapters of another base or encoder and adapters without usable exemplars are left out.
        """
        version = store.version()  # before the listing: what changes in between is seen next time
        if version == self._snapshot.store_version:
            return False
        with self._write:
            known = {e.name: e.stamp for e in self._snapshot.entries}
            wanted = {a.name: a for a in reversed(store.ls()) if self._accepts(a)}
            stale = {i for i, stamp in known.items() if i not in wanted or _stamp(wanted[i]) != stamp}
            fresh = [a for i, a in wanted.items() if i not in known or i in stale]
            loaded = {a.name: (_stamp(a), v) for a in fresh if (v := self._exemplars(store, a)) is not None}
            self._snapshot = _changed(self._snapshot, add=loaded, remove=stale, version=version)
        return True

    def rebuild(self, store: Store) -> None:
        """Forget everything and read the whole store."""
        with self._write:
            self._snapshot = _Snapshot(faiss.IndexIDMap2(faiss.IndexFlatIP(self.key.width)))
        self.sync(store)

    def save(self, folder: Path) -> None:
        """Write the index and its manifest; on `StorageError` what was saved before loads, or nothing does."""
        snapshot = self._snapshot
        data = faiss.serialize_index(snapshot.faiss).tobytes()
        manifest = {
            "format_version": FORMAT_VERSION,
            **asdict(self.key),
            "adapters": [asdict(e) for e in snapshot.entries],
            "next_label": snapshot.next_label,
            "store_version": snapshot.store_version,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        with storage_errors("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
        # alone: two writers would mix their files, and what one finds half-written is from a killed one
        with locked(folder) as alone, storage_errors("write", folder):
            if alone:
                sweep(folder)
            write_atomic(folder / INDEX_FILE, data)
            write_atomic(folder / MANIFEST_FILE, json.dumps(manifest))

    @classmethod
    def load(cls, folder: Path, key: Key) -> AdapterIndex | None:
        """The saved index, or None when there is none of this key or it is damaged: then `rebuild` one."""
        _sweep(folder)
        try:
            with locked(folder, shared=True):
                manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
                data = (folder / INDEX_FILE).read_bytes()
            snapshot = _restored(manifest, data, key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as e:
            log.warning("index in %s is not usable (%s), it is built again", folder, str(e)[:200])
            return None
        if snapshot is None:
            return None
        index = cls(key)
        index._snapshot = snapshot
        return index

    def _accepts(self, adapter: Adapter) -> bool:
        return (adapter.base_fingerprint, adapter.encoder_fingerprint) == (
            self.key.base_fingerprint,
            self.key.encoder_fingerprint,
        )

    def _exemplars(self, store: Store, adapter: Adapter) -> Tensor | None:
        try:
            found = store.exemplars(adapter)
            return None if found is None else check_vectors(found, self.key.width)
        except DndError as e:
            log.warning("adapter %r is left out of routing: %s", adapter.name, e.message)
            return None


def _sweep(folder: Path) -> None:
    """Remove what a killed `save` left, unless one is at work."""
    with locked(folder, wait=False) as alone:
        try:
            if alone:
                sweep(folder)
        except OSError as e:  # a read-only disk can still be read
            log.warning("what a killed process left in %s cannot be cleared: %s", folder, e.strerror or e)


def _stamp(adapter: Adapter) -> str:
    parts = (adapter.id, adapter.created, adapter.refined, adapter.exemplars_sha256)
    return " ".join(part for part in parts if part)


def _changed(
    old: _Snapshot,
    *,
    add: Mapping[str, tuple[str, Tensor]] | None = None,
    remove: set[str] | None = None,
    version: str | None = None,
) -> _Snapshot:
    """A new snapshot; `old` stays as it is."""
    index = faiss.clone_index(old.faiss)
    for e in old.entries:
        if e.name in (remove or ()):
            index.remove_ids(faiss.IDSelectorRange(e.start, e.start + e.count))
    entries = [e for e in old.entries if e.name not in (remove or ())]
    label = old.next_label
    for name, (stamp, vectors) in (add or {}).items():
        index.add_with_ids(vectors.numpy(), np.arange(label, label + len(vectors), dtype=np.int64))
        entries.append(_Entry(name, stamp, label, len(vectors)))
        label += len(vectors)
    return _Snapshot(index, tuple(entries), label, version)


def _search(snapshot: _Snapshot, vectors: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and entry numbers, both (n, min(k, exemplars))."""
    k = min(k, snapshot.faiss.ntotal)
    if k == 0:
        return np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64)
    with _one_thread():
        scores, labels = snapshot.faiss.search(vectors.numpy(), k)
    return scores, snapshot.owners(labels)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Search without FAISS's worker threads: starting them costs more than these small queries."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # holds for the calling thread only
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _restored(manifest: dict[str, Any], data: bytes, key: Key) -> _Snapshot | None:
    """The saved snapshot, None if it is of another key; raises ValueError and the like when anything does not fit."""
    if manifest["format_version"] != FORMAT_VERSION or any(manifest[k] != v for k, v in asdict(key).items()):
        return None
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise ValueError("its hash is not the manifest's")
    entries = tuple(_Entry(**e) for e in manifest["adapters"])
    index: Any = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    if index.d != key.width or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError("its vectors are of another kind")
    labels = _labels(entries)
    if not np.array_equal(np.sort(faiss.vector_to_array(index.id_map)), labels):
        raise ValueError("its labels are not the manifest's")
    next_label = int(manifest["next_label"])
    if len({e.name for e in entries}) != len(entries) or next_label <= labels.max(initial=-1):
        raise ValueError("its manifest contradicts itself")
    return _Snapshot(index, entries, next_label, manifest["store_version"])


def _labels(entries: Sequence[_Entry]) -> np.ndarray:
    parts = [np.arange(e.start, e.start + e.count, dtype=np.int64) for e in entries]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
