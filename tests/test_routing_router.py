"""The decision: three outcomes, modes, exact prompt sets, other processes, and trouble on disk."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import TINY, store_one
from helpers import random_flat
from routing_parts import BASE, ENCODER, WIDTH, FakeStore, adapter, task_vectors

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.routing import Router, Support, Thresholds, index
from dnd_sdk.routing.support import centres_of
from dnd_sdk.routing.vector_file import INDEX_FILE

THRESHOLDS = Thresholds(reuse=0.9, reuse_single=0.5, support=0.1)
TASKS = centres_of(torch.cat([task_vectors(t) for t in range(4)]), 8)


def store_with(n: int = 3) -> FakeStore:
    store = FakeStore()
    for t in range(n):
        store.put(adapter(f"t{t}", prompt_hash=f"hash{t}"), task_vectors(t))
    return store


def router(store: FakeStore | AdapterStore, **more) -> Router:  # type: ignore[no-untyped-def]
    return Router(store, "mini", ENCODER, BASE, THRESHOLDS, **more)


def test_known_task_is_reused() -> None:
    found = router(store_with()).route(task_vectors(1, seed=1))
    assert (found.decision, found.adapter and found.adapter.name) == ("reuse", "t1")
    assert found.score == found.neighbours[0][1] > 0.9 and found.neighbours[0][0] == "t1"
    assert "t1 was made for such prompts" in found.reason


def test_new_task_is_generated_for() -> None:
    found = router(store_with(), support=Support(TASKS)).route(task_vectors(3, seed=1))
    assert found.decision == "generate" and found.adapter is None and found.score is not None and found.score < 0.9
    assert found.support is not None and found.support > 0.1
    assert len(found.neighbours) == 3 and "is below 0.90" in found.reason


def test_prompts_unlike_any_training_stay_on_the_base() -> None:
    found = router(store_with(), support=Support(TASKS)).route(-TASKS[:3])
    assert found.decision == "base" and found.adapter is None and found.support is not None and found.support < 0.1
    assert "unlike any training task" in found.reason and len(found.neighbours) >= 1


def test_nearness_to_noise_counts_against() -> None:
    noise = task_vectors(7)
    near_both = torch.nn.functional.normalize(noise + 0.6 * TASKS[0], dim=1)
    assert router(store_with(), support=Support(TASKS)).route(near_both).decision == "generate"
    assert router(store_with(), support=Support(TASKS, centres_of(noise, 4))).route(near_both).decision == "base"


def test_an_empty_store_generates() -> None:
    found = router(FakeStore()).route(task_vectors(0))
    assert (found.decision, found.score, found.neighbours) == ("generate", None, [])
    assert found.reason == "no stored adapter to compare with"


def test_at_most_five_neighbours() -> None:
    assert len(router(store_with(9)).route(task_vectors(20)).neighbours) == 5


def test_mode_reuse_never_generates() -> None:
    r = router(store_with())
    assert r.route(task_vectors(1, seed=1), mode="reuse").decision == "reuse"
    found = r.route(task_vectors(3), mode="reuse")
    assert found.decision == "base" and "ruled out" in found.reason


def test_mode_generate_is_obeyed() -> None:
    r = router(store_with(), support=Support(TASKS))
    found = r.route(task_vectors(1), prompt_hash="hash1", mode="generate")
    assert found.decision == "generate" and found.neighbours[0][0] == "t1"
    assert r.route(-TASKS[:3], mode="generate").decision == "generate"


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="auto, reuse, generate, got 'maybe'"):
        router(store_with()).route(task_vectors(0), mode="maybe")  # type: ignore[arg-type]


def test_exact_prompt_set_needs_no_likeness() -> None:
    r = router(store_with())
    found = r.route(task_vectors(9), prompt_hash="hash2")
    assert (found.decision, found.score, found.reason) == ("reuse", 1.0, "exact prompt set")
    assert found.adapter is not None and found.adapter.name == "t2" and found.neighbours == [("t2", 1.0)]
    assert r.exact("hash2") == found and r.exact("hash9") is None
    assert r._index is None  # decided without FAISS


def test_of_equal_prompt_sets_the_newest_is_reused() -> None:
    store = store_with()
    store.put(adapter("zz-newer", prompt_hash="hash0", created="2026-05-05T00:00:00+00:00"), None)
    found = router(store).exact("hash0")
    assert found is not None and found.adapter is not None and found.adapter.name == "zz-newer"


def test_only_adapters_of_this_base_and_encoder_count() -> None:
    store = FakeStore()
    store.put(adapter("base", base_fingerprint="c" * 64, prompt_hash="h"), task_vectors(0))
    store.put(adapter("encoder", encoder_fingerprint="f" * 64, prompt_hash="h"), task_vectors(0))
    store.put(adapter("unfit", prompt_hash="h"), task_vectors(0))
    r = router(store, usable=lambda a: a.name != "unfit")
    assert r.exact("h") is None and r.route(task_vectors(0), prompt_hash="h").neighbours == []


def test_one_prompt_has_its_own_threshold() -> None:
    r = router(store_with())
    one = task_vectors(1, 1, seed=3)
    found = r.route_one(one)
    assert found.decision == "reuse" and found.adapter is not None and found.adapter.name == "t1"
    assert found.score is not None and 0.5 <= found.score < 0.9  # the threshold for sets would have refused it
    other = r.route_one(task_vectors(8, 1))
    assert other.decision == "base" and "below 0.50" in other.reason and other.neighbours
    with pytest.raises(ConfigError, match="takes one prompt, got 2"):
        r.route_one(task_vectors(0, 2))


@pytest.mark.parametrize(
    ("pooled", "match"),
    [
        (torch.full((2, WIDTH), float("nan")), "NaN"),
        (torch.ones(2, WIDTH), "not L2-normalised"),
        (task_vectors(0, width=9), rf"expected \(n, {WIDTH}\)"),
        (torch.zeros(0, WIDTH), "shape"),
    ],
)
def test_unusable_embeddings_are_refused(pooled: torch.Tensor, match: str) -> None:
    r = router(store_with())
    r.route(task_vectors(0))
    with pytest.raises(InputError, match=match):
        r.route(pooled)


def test_decision_as_json() -> None:
    r = router(store_with(1))
    data = json.loads(json.dumps(r.route(task_vectors(0, seed=1)).to_dict()))
    assert data["decision"] == "reuse" and data["adapter"] == {
        "name": "t0",
        "path": str(Path("adapters/t0")),
        "source": "generated",
    }
    assert data["neighbours"] == [{"adapter": "t0", "score": data["score"]}] and data["reason"]
    assert r.route(task_vectors(5)).to_dict()["adapter"] is None


def test_adapters_of_another_process_are_noticed(home: Home) -> None:
    mine, theirs = AdapterStore(home), AdapterStore(home)
    r = router(mine, folder=home.index)
    assert r.route(task_vectors(0)).decision == "generate"
    more = {"base_fingerprint": BASE, "encoder": "mini", "encoder_fingerprint": ENCODER}
    store_one(theirs, random_flat(TINY), name="late", exemplars=task_vectors(0), prompt_hash="h", **more)
    assert r.route(task_vectors(0, seed=1)).decision == "reuse"
    assert r.exact("h") is not None
    theirs.rm("late")
    assert r.route(task_vectors(0, seed=1)).decision == "generate" and r.exact("h") is None


def test_index_is_kept_between_runs_and_made_again_when_damaged(tmp_path: Path) -> None:
    store = store_with()
    first = router(store, folder=tmp_path).route(task_vectors(1, seed=1))
    assert store.reads == 3
    assert router(store, folder=tmp_path).route(task_vectors(1, seed=1)) == first and store.reads == 3
    saved = next(tmp_path.iterdir())
    assert sorted(p.suffix for p in saved.iterdir()) == [".f32", ".jsonl"]
    (saved / INDEX_FILE).write_bytes(b"torn")
    assert router(store, folder=tmp_path).route(task_vectors(1, seed=1)) == first and store.reads == 6
    assert router(store, folder=tmp_path).route(task_vectors(1, seed=1)) == first and store.reads == 6


def test_vectors_damaged_under_a_running_router_are_made_again(tmp_path: Path) -> None:
    store = store_with()
    r = router(store, folder=tmp_path)
    first = r.route(task_vectors(1, seed=1))
    later = router(store, folder=tmp_path)
    later._current_index(WIDTH)  # knows where the vectors are, has read none of them
    [file] = tmp_path.glob("*/*.f32")
    file.write_bytes(file.read_bytes()[: 4 * WIDTH] + bytes(file.stat().st_size - 4 * WIDTH))
    assert later.route(task_vectors(1, seed=1)) == first and store.reads == 6


def test_a_full_disk_does_not_stop_routing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dnd_sdk.routing.vector_file.append_rows", full)
    store = store_with()
    r = router(store, folder=tmp_path)
    with caplog.at_level(logging.WARNING, "dnd_sdk"):
        assert r.route(task_vectors(1, seed=1)).decision == "reuse"
        store.put(adapter("t5"), task_vectors(5))
        assert r.route(task_vectors(5, seed=1)).decision == "reuse"
    assert "No space left" in caplog.text and len(caplog.records) == 1


def test_threads_agree_with_one_thread() -> None:
    store = store_with(4)
    r = router(store)
    expected = [r.route(task_vectors(t, seed=1)) for t in range(4)]
    wrong: list[object] = []

    def ask(t: int) -> None:
        for _ in range(20):
            found = r.route(task_vectors(t, seed=1))
            if (found.decision, found.adapter) != (expected[t].decision, expected[t].adapter):
                wrong.append(found)

    threads = [threading.Thread(target=ask, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for i in range(20):  # adapters come and go meanwhile
        store.put(adapter(f"x{i}"), task_vectors(40 + i))
        store.rm(f"x{i}")
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_score_is_that_of_the_adapter_it_comes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another adapter that takes the name while prompts are compared is not what they were compared with."""
    store = FakeStore()
    old = store.put(adapter("a"), task_vectors(1))
    asked = router(store)
    real = index.set_similarity

    def meanwhile(*args: Any, **more: Any) -> float:
        monkeypatch.setattr(index, "set_similarity", real)
        store.put(adapter("a", created="2026-02-02T00:00:00+00:00"), task_vectors(2))
        assert asked.route(task_vectors(2, seed=1)).decision == "reuse"
        return real(*args, **more)

    monkeypatch.setattr(index, "set_similarity", meanwhile)
    assert asked.route(task_vectors(1, seed=1)).adapter == old
    assert asked.route(task_vectors(1, seed=1)).adapter is None
