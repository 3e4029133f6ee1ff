"""Vectors on disk: whole states whatever is damaged or killed, several processes, and what a change writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_folders import TINY, store_one
from helpers import random_flat
from routing_parts import BASE, ENCODER, WIDTH, FakeStore, adapter, task_vectors

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import StorageError
from dnd_sdk.files import locked
from dnd_sdk.routing import AdapterIndex, compare_saved, vector_file
from dnd_sdk.routing.vector_file import INDEX_FILE, Kept, Key, VectorFile

KEY = Key(WIDTH, "mini", ENCODER, BASE)


def stored(n: int = 5) -> FakeStore:
    store = FakeStore()
    for t in range(n):
        store.put(adapter(f"a{t}"), task_vectors(t, 9))
    return store


def synced(store: FakeStore | AdapterStore, folder: Path, key: Key = KEY) -> AdapterIndex:
    index = AdapterIndex(key, folder)
    index.sync(store)
    return index


def names_in(folder: Path) -> list[str]:
    return sorted(p.name if p.suffix != ".f32" else "*.f32" for p in folder.iterdir())


def test_another_session_answers_alike_and_reads_no_exemplars(tmp_path: Path) -> None:
    store = stored()
    first = synced(store, tmp_path)
    again = synced(store, tmp_path)
    assert store.reads == 5 and set(again.names) == set(first.names)
    for t in range(5):
        assert again.score(task_vectors(t, seed=1)) == first.score(task_vectors(t, seed=1))
    assert names_in(tmp_path) == ["*.f32", INDEX_FILE] and compare_saved(tmp_path, store) == (5, 0)


def test_a_change_writes_what_it_touches(tmp_path: Path) -> None:
    store = stored(20)
    index = synced(store, tmp_path)
    [vectors], lines = tmp_path.glob("*.f32"), tmp_path / INDEX_FILE
    sizes = vectors.stat().st_size, lines.stat().st_size
    store.put(adapter("new"), task_vectors(50, 9))
    index.sync(store)
    assert vectors.stat().st_size - sizes[0] == 4 * WIDTH * (1 + 9)
    assert 0 < lines.stat().st_size - sizes[1] < 300
    sizes = vectors.stat().st_size, lines.stat().st_size
    store.rm("a3")
    index.sync(store)
    assert vectors.stat().st_size == sizes[0] and 0 < lines.stat().st_size - sizes[1] < 100
    assert set(synced(store, tmp_path).names) == set(index.names) and store.reads == 21


def test_what_was_removed_is_folded_away(tmp_path: Path) -> None:
    store = stored(3)
    index = synced(store, tmp_path)
    for i in range(400):
        store.put(adapter("a0", refined=f"{i}"), task_vectors(i, 9))
        index.sync(store)
    [vectors] = tmp_path.glob("*.f32")
    assert vectors.stat().st_size < 4 * WIDTH * 10 * 300 and names_in(tmp_path) == ["*.f32", INDEX_FILE]
    assert compare_saved(tmp_path, store) == (3, 0)
    assert index.score(task_vectors(399, seed=2))[0].name == "a0"


def test_two_processes_share_what_either_adds(tmp_path: Path) -> None:
    store = stored(3)
    one, two = synced(store, tmp_path), synced(store, tmp_path)
    store.put(adapter("b"), task_vectors(7))
    store.put(adapter("c"), task_vectors(8))
    one.sync(store)
    reads = store.reads
    two.sync(store)
    assert store.reads == reads and two.score(task_vectors(8, seed=1)) == one.score(task_vectors(8, seed=1))
    assert compare_saved(tmp_path, store) == (5, 0)


def test_an_adapter_that_comes_back_the_same_is_written_again(tmp_path: Path) -> None:
    """Another process took it out of the file and was killed before it could put it back."""
    store = stored(3)
    one, two = synced(store, tmp_path), synced(store, tmp_path)
    back = store.kept["a1"]
    store.rm("a1")
    two.sync(store)
    store.put(*back)
    assert compare_saved(tmp_path, store) == (2, 1)
    one.sync(store)
    assert compare_saved(tmp_path, store) == (3, 0) and one.score(task_vectors(1, seed=1))[0].name == "a1"


def test_the_last_adapter_leaves_the_file_too(tmp_path: Path) -> None:
    """A process removed it and was killed before its index knew; the store is empty for whoever comes next."""
    store = stored(1)
    synced(store, tmp_path)
    store.rm("a0")
    synced(FakeStore(), tmp_path)
    assert compare_saved(tmp_path, FakeStore()) == (0, 0)


def test_an_empty_store_makes_no_index(tmp_path: Path) -> None:
    assert not synced(FakeStore(), tmp_path / "index").names and not (tmp_path / "index").exists()


def test_a_reader_keeps_what_another_folded_away(tmp_path: Path) -> None:
    store = stored(3)
    slow, busy = synced(store, tmp_path), synced(store, tmp_path)
    slow._at_hand.clear()
    expected = busy.score(task_vectors(1, seed=1))
    file = busy._file
    assert file is not None
    with file.locked():
        file._fold(dict(file.kept))
    assert slow.score(task_vectors(1, seed=1)) == expected, "the old file is read until it is let go"
    store.put(adapter("new"), task_vectors(9))
    slow.sync(store)
    slow._at_hand.clear()
    assert slow.score(task_vectors(9, seed=1))[0].name == "new"


@pytest.mark.parametrize(
    "key",
    [
        Key(WIDTH, "mini", "f" * 64, BASE),
        Key(WIDTH, "mini", ENCODER, "c" * 64),
        Key(WIDTH, "maxi", ENCODER, BASE),
    ],
)
def test_vectors_of_another_key_are_not_taken(tmp_path: Path, key: Key) -> None:
    store = stored()
    synced(store, tmp_path)
    other = FakeStore()
    more = {"base_fingerprint": key.base_fingerprint, "encoder_fingerprint": key.encoder_fingerprint}
    other.put(adapter("a0", **more), task_vectors(0, 9))
    assert synced(other, tmp_path, key).names == ("a0",) and other.reads == 1
    assert compare_saved(tmp_path, other) == (1, 0)


def damage_line(folder: Path, n: int, **changes: object) -> None:
    path = folder / INDEX_FILE
    lines = path.read_text().splitlines()
    lines[n] = json.dumps(json.loads(lines[n]) | changes)
    path.write_text("\n".join(lines) + "\n")


def damage_vectors(folder: Path, change: Callable[[bytes], bytes]) -> None:
    [path] = folder.glob("*.f32")
    path.write_bytes(change(path.read_bytes()))


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HARMS: dict[str, Callable[[Path], object]] = {
    "no lines": lambda d: (d / INDEX_FILE).unlink(),
    "no vectors": lambda d: next(d.glob("*.f32")).unlink(),
    "vectors cut": lambda d: damage_vectors(d, lambda b: b[:-7]),
    "vectors of zeros": lambda d: damage_vectors(d, lambda b: bytes(len(b))),
    "vectors of noise": lambda d: damage_vectors(d, lambda b: bytes(range(256)) * (len(b) // 256 + 1)),
    "line cut": lambda d: (d / INDEX_FILE).write_bytes((d / INDEX_FILE).read_bytes()[:-7]),
    "no object": lambda d: (d / INDEX_FILE).write_text("[]\n"),
    "nested": lambda d: (d / INDEX_FILE).write_text("[" * 100_000 + "\n"),
    "bytes": lambda d: (d / INDEX_FILE).write_bytes(b"\xff\xfe\n"),
    "version": lambda d: damage_line(d, 0, format_version=99),
    "no file named": lambda d: damage_line(d, 0, vectors=None),
    "another file": lambda d: damage_line(d, 0, vectors="../../etc/passwd"),
    "start": lambda d: damage_line(d, 1, start=-1),
    "beyond the end": lambda d: damage_line(d, 1, start=10**9),
    "count": lambda d: damage_line(d, 2, count=0),
    "huge count": lambda d: damage_line(d, 2, count=10**15),
    "coherence": lambda d: damage_line(d, 2, coherence=0),
    "text": lambda d: damage_line(d, 2, start="x"),
    "infinite": lambda d: damage_line(d, 2, start=float("inf")),
    "no float": lambda d: damage_line(d, 2, coherence=10**400),
    "name": lambda d: damage_line(d, 3, name=None),
    "pipe of lines": lambda d: pipe_instead(d / INDEX_FILE),
    "pipe of vectors": lambda d: pipe_instead(next(d.glob("*.f32"))),
}


@pytest.mark.parametrize("kind", HARMS)
def test_damage_is_made_good_from_the_store(tmp_path: Path, kind: str) -> None:
    store = stored()
    expected = synced(store, tmp_path).score(task_vectors(1, seed=1))
    HARMS[kind](tmp_path)
    assert synced(store, tmp_path).score(task_vectors(1, seed=1)) == expected
    assert compare_saved(tmp_path, store) == (5, 0) and names_in(tmp_path) == ["*.f32", INDEX_FILE]


def test_a_write_that_fails_leaves_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(2)
    index = synced(store, tmp_path)
    file = index._file
    assert file is not None
    real = file._lines.append
    monkeypatch.setattr(file._lines, "append", lambda lines: (_ for _ in ()).throw(OSError(28, "No space left")))
    with file.locked(), pytest.raises(StorageError, match="No space left"):
        file.write({"late": next(iter(index._centres.values())).view.owners[0].vectors})  # type: ignore[union-attr]
    monkeypatch.setattr(file._lines, "append", real)
    assert compare_saved(tmp_path, store) == (2, 0), "rows without a line count for nothing"


def test_a_half_written_row_is_cut_off(tmp_path: Path) -> None:
    store = stored(2)
    index = synced(store, tmp_path)
    damage_vectors(tmp_path, lambda b: b + b"half")
    store.put(adapter("new"), task_vectors(7))
    index.sync(store)
    index._at_hand.clear()
    assert index.score(task_vectors(7, seed=1))[0].name == "new" and compare_saved(tmp_path, store) == (3, 0)


def test_what_killed_processes_and_earlier_versions_left_is_swept(tmp_path: Path) -> None:
    store = stored(2)
    synced(store, tmp_path)
    left = [f".{INDEX_FILE}.{'0' * 32}", f"vectors-{'0' * 32}.f32", "index.faiss", "index.json"]
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    with locked(tmp_path, shared=True):
        VectorFile.found_in(tmp_path)
        assert all((tmp_path / name).exists() for name in left), "a look changes nothing"
    synced(store, tmp_path)
    assert names_in(tmp_path) == ["*.f32", INDEX_FILE]


def test_with_the_real_store(home: Home, tmp_path: Path) -> None:
    store = AdapterStore(home)
    more = {"base_fingerprint": BASE, "encoder": "mini", "encoder_fingerprint": ENCODER}
    for t in range(3):
        store_one(store, random_flat(TINY, seed=t), name=f"t{t}", exemplars=task_vectors(t), **more)
    synced(store, tmp_path)
    loaded = synced(AdapterStore(home), tmp_path)
    AdapterStore(home).rm("t1")
    assert compare_saved(tmp_path, store) == (2, 1)
    assert loaded.sync(store) and len(loaded.names) == 2 and compare_saved(tmp_path, store) == (2, 0)
    store.set_exemplars(store.get("t2"), task_vectors(9))
    assert loaded.sync(store) and loaded.score(task_vectors(9, seed=6))[0].name == "t2"


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    store = stored(4)
    index = synced(store, tmp_path)
    owners = [o for o in index._centres[None].view.owners if o is not None]
    for owner in owners:
        exemplars = store.kept[owner.name][1]
        assert torch.equal(torch.from_numpy(owner.vectors.exemplars), exemplars)
        mean = exemplars.mean(dim=0)
        np.testing.assert_allclose(owner.vectors.centre, (mean / mean.norm()).numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: shutil.rmtree(d),
        lambda d: (d / INDEX_FILE).unlink(),
        lambda d: next(d.glob("*.f32")).unlink(),
    ],
)
def test_what_is_taken_from_a_session_at_work_is_made_again(
    tmp_path: Path, harm: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = stored(), tmp_path / "index"
    index = synced(store, folder)
    monkeypatch.setattr(index, "_keep_at_hand", lambda *what: None)
    index._at_hand.clear()
    harm(folder)
    store.put(adapter("new"), task_vectors(50, 9))
    index.sync(store)
    for answering in (index, synced(store, folder)):
        for query in (task_vectors(50, seed=1), task_vectors(0, seed=1)):
            assert answering.score(query) == synced(store, tmp_path / "beside").score(query)
    assert compare_saved(folder, store) == (6, 0)


def test_a_backup_put_back_under_a_session_at_work(tmp_path: Path) -> None:
    store, folder = stored(), tmp_path / "index"
    index = synced(store, folder)
    shutil.copytree(folder, tmp_path / "backup")
    for task in (60, 61):
        store.put(adapter(f"after{task}"), task_vectors(task, 9))
    index.sync(store)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "backup", folder)
    store.put(adapter("other"), task_vectors(51, 9))
    index.sync(store)
    beside = synced(store, tmp_path / "beside")
    index._at_hand.clear()
    for task in (60, 51, 0):
        assert index.score(task_vectors(task, seed=1)) == beside.score(task_vectors(task, seed=1))


def test_files_that_were_folded_away_are_let_go(tmp_path: Path) -> None:
    store = stored()
    index, other = synced(store, tmp_path), synced(store, tmp_path)
    for n in range(600):
        store.put(adapter("again", created=f"2026-01-01T00:00:00.{n:06}+00:00"), task_vectors(50, 2))
        index.sync(store)
    other.sync(store)
    for each in (index, other):
        each.score(task_vectors(1))
        vectors = [o.vectors for centres in each._centres.values() for o in centres.view.owners if o is not None]
        assert len(vectors) == 6 and len({v.rows for v in (*vectors, *each._at_hand) if isinstance(v, Kept)}) == 1


def test_rows_that_others_wrote_in_between_are_told_by_their_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = stored(2)
    synced(store, tmp_path)
    index = synced(store, tmp_path)
    real, calls = vector_file.append_rows, list[Path]()

    def others_first(path: Path, blocks: Iterable[np.ndarray], width: int) -> list[tuple[int, int]]:
        calls.append(path)
        moved = int(len(calls) == 1)  # as if its end had been another's a moment ago
        return [(start - moved, n) for start, n in real(path, blocks, width)]

    monkeypatch.setattr(vector_file, "append_rows", others_first)
    store.put(adapter("new"), task_vectors(7))
    index.sync(store)
    assert "holds other rows" in caplog.text and len(calls) == 2
    index._at_hand.clear()
    assert index.score(task_vectors(7, seed=1))[0].name == "new" and compare_saved(tmp_path, store) == (3, 0)


def test_vectors_of_others_stay_where_locks_do_not_reach_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(2)
    synced(store, tmp_path)
    theirs = tmp_path / f"vectors-{'0' * 32}.f32"
    theirs.write_bytes(b"on its way")
    with monkeypatch.context() as patched:
        patched.setattr("dnd_sdk.files.atomic.reach", lambda folder: "machine")
        synced(store, tmp_path)
        assert theirs.exists()
    synced(store, tmp_path)
    assert not theirs.exists()
