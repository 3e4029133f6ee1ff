"""The index against comparing every adapter, its store, and readers beside a writer."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from adapter_folders import TINY, store_one
from helpers import random_flat
from routing_parts import BASE, ENCODER, WIDTH, FakeStore, adapter, task_vectors
from session_parts import Interrupt

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, ConfigError, InputError
from dnd_sdk.routing import centres
from dnd_sdk.routing.index import COMPARED, AdapterIndex, compare_saved
from dnd_sdk.routing.similarity import set_similarity
from dnd_sdk.routing.vector_file import Key

KEY = Key(WIDTH, "mini", ENCODER, BASE)


def filled(n: int = 6, per_adapter: int = 9) -> AdapterIndex:
    index = AdapterIndex(KEY)
    for t in range(n):
        index.add(f"a{t}", task_vectors(t, per_adapter))
    return index


@pytest.mark.parametrize("n", [1, 3, 40, 300])
def test_score_equals_comparing_every_adapter(n: int) -> None:
    index, query = filled(4), task_vectors(2, n, seed=5)
    used = query if n <= 128 else query[torch.linspace(0, n - 1, 128).round().long()]
    expected = sorted(((set_similarity(used, task_vectors(t, 9)), f"a{t}") for t in range(4)), reverse=True)
    found = index.score(query)
    assert [h.name for h in found] == [name for _, name in expected]
    assert [h.score for h in found] == pytest.approx([s for s, _ in expected], rel=1e-4)


def test_an_empty_index_answers() -> None:
    index = AdapterIndex(KEY)
    assert index.score(task_vectors(0)) == [] and index.names == ()


@pytest.mark.parametrize("n", [1, 2, 12, 64])
def test_of_many_adapters_the_best_are_those_of_comparing_all(n: int) -> None:
    index = filled(200)
    for task in (0, 77, 199):
        query = task_vectors(task, n, seed=5)
        best = max(range(200), key=lambda t: set_similarity(query, task_vectors(t, 9)))
        found = index.score(query)
        assert len(found) == COMPARED and found[0].name == f"a{best}" == f"a{task}"


def test_adapters_of_other_roles_are_not_compared() -> None:
    index = filled(40)
    index.add("pirate", task_vectors(1, 9), role="a pirate")
    assert [h.name for h in index.score(task_vectors(1, 9), "a pirate")] == ["pirate"]
    assert index.score(task_vectors(1, 9))[0].name == "a1" and index.score(task_vectors(1, 9), "a parrot") == []


def test_remove_then_add_again() -> None:
    index = filled(3)
    index.remove("a1")
    assert index.names == ("a0", "a2")
    assert {h.name for h in index.score(task_vectors(1, 9))} == {"a0", "a2"}
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
    assert index.score(task_vectors(0)) == before and index.names == ("a0", "a1")


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
    assert len(index.names) == 60 and index._centres[None].view.n_live == 60


def test_sync_follows_the_store() -> None:
    store, index = FakeStore(), AdapterIndex(KEY)
    for t in range(3):
        store.put(adapter(f"t{t}"), task_vectors(t))
    store.put(adapter("other-base", base_fingerprint="c" * 64), task_vectors(3))
    store.put(adapter("other-encoder", encoder_fingerprint="f" * 64), task_vectors(4))
    store.put(adapter("no-exemplars"), None)
    assert index.sync(store) and set(index.names) == {"t0", "t1", "t2"}
    assert not index.sync(store) and store.reads == 4
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


def test_the_same_weights_under_two_names_keep_both_sets_of_prompts(home: Home) -> None:
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


def test_exemplars_of_another_hash_are_read_again() -> None:
    store, index = FakeStore(), AdapterIndex(KEY)
    store.put(adapter("t", exemplars_sha256="0" * 64), task_vectors(0))
    index.sync(store)
    store.put(adapter("t", exemplars_sha256="1" * 64), task_vectors(1))
    index.sync(store)
    assert index.score(task_vectors(1, seed=1))[0].score > 0.9


def test_after_ctrl_c_in_the_middle_everything_is_taken_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FakeStore()
    for t in range(3):
        store.put(adapter(f"a{t}"), task_vectors(t))
    index = AdapterIndex(KEY, tmp_path)
    index.sync(store)
    store.rm("a1")
    store.put(adapter("a2", created="2026-02-02T00:00:00+00:00"), task_vectors(5))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(centres, "View", Interrupt(None, KeyboardInterrupt(), after=False))
        index.sync(store)
    index.sync(store)
    assert sorted(h.name for h in index.score(task_vectors(1))) == ["a0", "a2"] == sorted(index.names)
    assert index.score(task_vectors(5, seed=1))[0].name == "a2" and compare_saved(tmp_path, store) == (2, 0)
