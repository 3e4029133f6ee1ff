"""The index against brute force and plain FAISS, its files, its store, and readers beside a writer."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from adapter_folders import TINY, store_one
from helpers import random_flat
from routing_parts import BASE, ENCODER, WIDTH, FakeStore, adapter, task_vectors, unit

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, ConfigError, InputError, StorageError
from dnd_sdk.files import locked
from dnd_sdk.routing.index import INDEX_FILE, MANIFEST_FILE, AdapterIndex, Key
from dnd_sdk.routing.similarity import set_similarity

KEY = Key(WIDTH, "mini", ENCODER, BASE)


def filled(n: int = 6, per_adapter: int = 9) -> AdapterIndex:
    index = AdapterIndex(KEY)
    for t in range(n):
        index.add(f"a{t}", task_vectors(t, per_adapter))
    return index


def test_search_equals_plain_faiss() -> None:
    index = filled()
    plain = faiss.IndexFlatIP(WIDTH)
    plain.add(torch.cat([task_vectors(t, 9) for t in range(6)]).numpy())
    query = task_vectors(3, 4, seed=7)
    scores, labels = plain.search(query.numpy(), 12)
    found = index.search(query, 12)
    assert [[h.name for h in row] for row in found] == [[f"a{i // 9}" for i in row] for row in labels.tolist()]
    np.testing.assert_allclose([[h.score for h in row] for row in found], scores, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 3, 40, 300])
def test_score_equals_comparing_every_adapter(n: int) -> None:
    index, query = filled(4), task_vectors(2, n, seed=5)
    used = query if n <= 128 else query[torch.linspace(0, n - 1, 128).round().long()]
    expected = sorted(((set_similarity(used, task_vectors(t, 9)), f"a{t}") for t in range(4)), reverse=True)
    found = index.score(query)
    assert [h.name for h in found] == [name for _, name in expected]
    assert [h.score for h in found] == pytest.approx([s for s, _ in expected], rel=1e-4)


def test_an_adapter_with_many_exemplars_does_not_hide_the_others() -> None:
    index = filled(6, per_adapter=2)
    index.add("crowd", task_vectors(0, 64, seed=3))
    assert len(index.score(task_vectors(0, 1, seed=9))) >= 5


def test_an_empty_index_answers() -> None:
    index = AdapterIndex(KEY)
    assert (
        index.score(task_vectors(0)) == []
        and index.search(task_vectors(0, 2), 3) == [[], []]
        and index.names == ()
    )


def test_remove_then_add_again() -> None:
    index = filled(3)
    index.remove("a1")
    assert index.names == ("a0", "a2")
    assert {h.name for row in index.search(task_vectors(1, 9), 50) for h in row} == {"a0", "a2"}
    index.add("a1", task_vectors(1, 4))
    assert index.score(task_vectors(1, 9, seed=2))[0].name == "a1"
    assert sorted(index.names) == ["a0", "a1", "a2"]


def test_refused_changes_leave_the_index_alone() -> None:
    index = filled(2)
    before = index.score(task_vectors(0))
    with pytest.raises(ConfigError, match="'a1' is in the index already"):
        index.add("a1", task_vectors(5))
    with pytest.raises(InputError, match="not L2-normalised"):
        index.add("new", 2 * task_vectors(5))
    with pytest.raises(InputError, match="NaN"):
        index.add("new", task_vectors(5) * float("nan"))
    with pytest.raises(InputError, match=rf"expected \(n, {WIDTH}\)"):
        index.add("new", task_vectors(5, width=8))
    with pytest.raises(AdapterNotFoundError, match="'gone'"):
        index.remove("gone")
    with pytest.raises(InputError, match="shape"):
        index.score(task_vectors(0, width=8))
    with pytest.raises(ConfigError, match="k must be"):
        index.search(task_vectors(0), 0)
    assert index.score(task_vectors(0)) == before and index.names == ("a0", "a1")


def test_faiss_threads_are_as_before() -> None:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        filled(2).score(task_vectors(0))
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)


def test_what_a_reader_holds_never_changes() -> None:
    index = filled(2)
    held = index._snapshot
    index.add("new", task_vectors(5))
    index.remove("a0")
    assert held.faiss.ntotal == 18 and [e.name for e in held.entries] == ["a0", "a1"]
    assert torch.equal(held.vectors(held.entries[0]), task_vectors(0, 9))


def test_readers_beside_a_writer_see_whole_states() -> None:
    index, stop, wrong = filled(4), threading.Event(), []

    def read() -> None:
        query = task_vectors(0, 8, seed=1)
        while not stop.is_set():
            hits = index.score(query)
            if hits[0].name != "a0" or not 4 <= len(hits) <= 5:
                wrong.append(hits)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    for i in range(60):
        index.add(f"extra{i}", task_vectors(50 + i % 7))
        index.remove(f"extra{i}")
    stop.set()
    for thread in readers:
        thread.join()
    assert wrong == []


def test_two_writers_lose_nothing() -> None:
    index = AdapterIndex(KEY)
    jobs = [
        threading.Thread(target=lambda w=w: [index.add(f"{w}-{i}", task_vectors(i, 3)) for i in range(20)])
        for w in range(3)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(index.names) == 60 and all(len(row) == 180 for row in index.search(task_vectors(0, 2), 999))


def test_saved_and_loaded_answers_alike(tmp_path: Path) -> None:
    index = filled(5)
    index.remove("a2")
    index.save(tmp_path)
    again = AdapterIndex.load(tmp_path, KEY)
    assert again is not None and again.names == index.names
    assert again.score(task_vectors(1)) == index.score(task_vectors(1))
    again.add("a2", task_vectors(2))  # labels go on where they stopped
    assert again.score(task_vectors(2, seed=4))[0].name == "a2"
    assert sorted(p.name for p in tmp_path.iterdir()) == [INDEX_FILE, MANIFEST_FILE]


def test_an_empty_index_is_saved_too(tmp_path: Path) -> None:
    AdapterIndex(KEY).save(tmp_path)
    again = AdapterIndex.load(tmp_path, KEY)
    assert again is not None and again.names == ()


@pytest.mark.parametrize(
    "key",
    [
        Key(WIDTH, "mini", "f" * 64, BASE),
        Key(WIDTH, "mini", ENCODER, "c" * 64),
        Key(WIDTH, "maxi", ENCODER, BASE),
        Key(WIDTH + 1, "mini", ENCODER, BASE),
    ],
)
def test_an_index_of_another_key_does_not_load(tmp_path: Path, key: Key) -> None:
    filled().save(tmp_path)
    assert AdapterIndex.load(tmp_path, key) is None


def damage_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: (d / MANIFEST_FILE).unlink(),
        lambda d: (d / INDEX_FILE).unlink(),
        lambda d: (d / INDEX_FILE).write_bytes((d / INDEX_FILE).read_bytes()[:-7]),
        lambda d: (d / MANIFEST_FILE).write_text("{"),
        lambda d: (d / MANIFEST_FILE).write_text("[]"),
        lambda d: (d / MANIFEST_FILE).write_text("[" * 100_000),
        lambda d: (d / MANIFEST_FILE).write_bytes(b"\xff\xfe"),
        lambda d: damage_manifest(d, adapters=[]),
        lambda d: damage_manifest(d, adapters=[{"start": 0}]),
        lambda d: damage_manifest(d, adapters=None),
        lambda d: damage_manifest(d, next_label=3),
        lambda d: damage_manifest(d, format_version=99),
        lambda d: damage_manifest(d, sha256="0" * 64),
    ],
)
def test_a_damaged_index_does_not_load(tmp_path: Path, harm) -> None:  # type: ignore[no-untyped-def]
    filled().save(tmp_path)
    harm(tmp_path)
    assert AdapterIndex.load(tmp_path, KEY) is None


def test_an_interrupted_save_never_mixes_two_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = filled(2)
    index.save(tmp_path)
    index.add("late", task_vectors(9))
    real = __import__("os").replace

    def stop_at_manifest(source: str, target: Path) -> None:
        if Path(target).name == MANIFEST_FILE:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr("dnd_sdk.files.atomic.os.replace", stop_at_manifest)
    with pytest.raises(StorageError, match="No space left"):
        index.save(tmp_path)
    assert AdapterIndex.load(tmp_path, KEY) is None  # the new index beside the old manifest counts for nothing
    assert sorted(p.name for p in tmp_path.iterdir()) == [INDEX_FILE, MANIFEST_FILE]


def test_sync_follows_the_store() -> None:
    store, index = FakeStore(), AdapterIndex(KEY)
    for t in range(3):
        store.put(adapter(f"t{t}"), task_vectors(t))
    store.put(adapter("other-base", base_fingerprint="c" * 64), task_vectors(3))
    store.put(adapter("other-encoder", encoder_fingerprint="f" * 64), task_vectors(4))
    store.put(adapter("no-exemplars"), None)
    assert index.sync(store) and index.names == ("t2", "t1", "t0")
    assert not index.sync(store) and store.listings == 1
    store.rm("t1")
    store.put(adapter("t5"), task_vectors(5))
    assert index.sync(store) and set(index.names) == {"t0", "t2", "t5"}
    assert index.score(task_vectors(5, seed=1))[0].name == "t5"


def test_sync_reads_an_adapter_again_that_was_stored_anew() -> None:
    store, index = FakeStore(), AdapterIndex(KEY)
    store.put(adapter("t"), task_vectors(0))
    index.sync(store)
    store.put(adapter("t", created="2026-02-02T00:00:00+00:00"), task_vectors(1))
    index.sync(store)
    assert index.score(task_vectors(1, seed=1))[0].score > 0.9


def test_sync_reads_an_adapter_again_whose_exemplars_were_refined() -> None:
    store, index = FakeStore(), AdapterIndex(KEY)
    for t in (0, 1):
        store.put(adapter(f"t{t}"), task_vectors(t, 4))
    index.sync(store)
    store.put(adapter("t0", refined="2026-02-01T00:00:00+00:00"), task_vectors(5, 6))
    assert index.sync(store) and set(index.names) == {"t0", "t1"}
    assert index.score(task_vectors(5, 8, seed=3))[0].name == "t0"


def test_one_bad_adapter_does_not_stop_the_sync(caplog: pytest.LogCaptureFixture) -> None:
    class Damaged(FakeStore):
        def exemplars(self, a):  # type: ignore[no-untyped-def]
            if a.name == "bad":
                raise AdapterCorruptError("exemplars are torn")
            return super().exemplars(a)

    store, index = Damaged(), AdapterIndex(KEY)
    store.put(adapter("bad"), task_vectors(0))
    store.put(adapter("unnormalised"), 3 * task_vectors(0))
    store.put(adapter("narrow"), task_vectors(0, width=8))
    store.put(adapter("good"), task_vectors(1))
    with caplog.at_level(logging.WARNING, "dnd_sdk"):
        index.sync(store)
    assert index.names == ("good",)
    assert "'bad' is left out of routing: exemplars are torn" in caplog.text and "'narrow'" in caplog.text


def test_rebuild_forgets_what_the_store_does_not_have() -> None:
    store, index = FakeStore(), filled(2)
    store.put(adapter("t"), task_vectors(0))
    index.rebuild(store)
    assert index.names == ("t",)


def test_with_the_real_store(home: Home, tmp_path: Path) -> None:
    store, index = AdapterStore(home), AdapterIndex(KEY)
    more = {"base_fingerprint": BASE, "encoder": "mini", "encoder_fingerprint": ENCODER}
    for t in range(3):
        store_one(store, random_flat(TINY, seed=t), name=f"t{t}", exemplars=task_vectors(t), **more)
    index.sync(store)
    index.save(tmp_path)
    loaded = AdapterIndex.load(tmp_path, KEY)
    assert loaded is not None and not loaded.sync(AdapterStore(home))  # its version is the store's: nothing to read
    AdapterStore(home).rm("t1")
    assert loaded.sync(store) and len(loaded.names) == 2
    best = loaded.score(unit(task_vectors(2, seed=6)))[0]
    assert best.name == "t2" and best.score > 0.9


def test_the_same_weights_under_two_names_keep_both_sets_of_prompts(home: Home, tmp_path: Path) -> None:
    store, index = AdapterStore(home), AdapterIndex(KEY)
    more = {"base_fingerprint": BASE, "encoder": "mini", "encoder_fingerprint": ENCODER}
    for t, name in enumerate(("cats", "dogs")):
        store_one(store, random_flat(TINY), name=name, exemplars=task_vectors(t), **more)
    index.sync(store)
    for t, name in enumerate(("cats", "dogs")):
        assert index.score(task_vectors(t, seed=4))[0].name == name
    store.rm("cats")
    index.sync(store)
    assert index.names == ("dogs",)


def test_an_index_by_id_of_an_earlier_version_is_built_again(tmp_path: Path) -> None:
    filled(2).save(tmp_path)
    damage_manifest(tmp_path, format_version=1)
    assert AdapterIndex.load(tmp_path, KEY) is None


def left_by_a_kill(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    left = [folder / f".{name}.{'0' * 32}" for name in (INDEX_FILE, MANIFEST_FILE)]
    for path in left:
        path.write_bytes(b"half")
    return left


def test_temporaries_of_a_killed_save_are_swept(tmp_path: Path) -> None:
    left_by_a_kill(tmp_path)
    assert AdapterIndex.load(tmp_path, KEY) is None and list(tmp_path.iterdir()) == []
    left_by_a_kill(tmp_path)
    filled(2).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [INDEX_FILE, MANIFEST_FILE]


def test_a_save_in_progress_is_not_swept(tmp_path: Path) -> None:
    left = left_by_a_kill(tmp_path)
    with locked(tmp_path, shared=True):
        AdapterIndex.load(tmp_path, KEY)
        assert all(path.exists() for path in left)


def test_exemplars_of_another_hash_are_read_again() -> None:
    store, index = FakeStore(), AdapterIndex(KEY)
    store.put(adapter("t", exemplars_sha256="0" * 64), task_vectors(0))
    index.sync(store)
    store.put(adapter("t", exemplars_sha256="1" * 64), task_vectors(1))
    index.sync(store)
    assert index.score(task_vectors(1, seed=1))[0].score > 0.9
