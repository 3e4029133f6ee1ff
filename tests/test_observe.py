"""The prompt stream: tasks found in a shuffled mix, bounds kept, state saved."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from routing_parts import WIDTH, task_vectors
from safetensors.torch import save_file

from dnd_sdk.errors import AdapterNotFoundError, ConfigError, InputError, StorageError
from dnd_sdk.observe import STATE_FILE, SUMS_FILE, PromptStream, StreamSettings

SMALL = StreamSettings(min_prompts=10, max_prompts=16)


def mixed(n_tasks: int = 5, size: int = 30, *, spread: float = 0.7) -> list[tuple[str, torch.Tensor]]:
    """A shuffled stream of (prompt "task number", vector)."""
    pairs = [
        (f"{t} {i}", v) for t in range(n_tasks) for i, v in enumerate(task_vectors(t, size, spread=spread, width=256))
    ]
    random.Random(0).shuffle(pairs)
    return pairs


def test_a_shuffled_mix_is_sorted_into_its_tasks() -> None:
    stream, ready = PromptStream(SMALL), []
    for prompt, v in mixed():
        seen = stream.add(prompt, v)
        if seen.ready:
            assert seen.size >= 10
            ready.append(Counter(p.split()[0] for p in stream.prompts(seen.cluster_id)))
    assert sorted(task for counts in ready for task in counts) == ["0", "1", "2", "3", "4"]  # pure, each once
    assert sorted(stream.sizes().values()) == [30] * 5


def test_ready_comes_once_and_at_the_size_asked_for() -> None:
    stream = PromptStream(SMALL)
    seen = [stream.add("p", v) for v in task_vectors(0, 40, spread=0.2)]
    assert [s.size for s in seen] == list(range(1, 41))
    assert [s.size for s in seen if s.ready] == [10]


def split_then_bridged() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two groups 45 degrees apart, and vectors in the middle of them."""
    a, b = torch.eye(WIDTH)[0], torch.eye(WIDTH)[1]
    side = torch.nn.functional.normalize(a + b, dim=0)
    jitter = 0.02 * torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0))

    def around(v: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.nn.functional.normalize(v + jitter, dim=1))

    return around(a) + around(side), around(torch.nn.functional.normalize(a + side, dim=0))


def test_clusters_that_grow_alike_merge() -> None:
    apart, between = split_then_bridged()
    settings = StreamSettings(min_prompts=30, join=0.9, merge=0.8, merge_size=8)
    stream = PromptStream(settings)
    first = [stream.add("x", v) for v in apart]
    assert len({s.cluster_id for s in first}) == 2
    seen = [stream.add("y", v) for v in between]
    assert list(stream.sizes().values()) == [60]
    assert stream._sums is not None
    assert torch.allclose(stream._sums[0], torch.stack(apart + between).sum(dim=0), atol=1e-4)
    assert sum(s.ready for s in first + seen) == 1
    survivor = next(iter(stream.sizes()))
    assert len(stream.prompts(survivor)) == 60
    with pytest.raises(AdapterNotFoundError, match="no cluster"):
        stream.prompts(1 - survivor)


def test_memory_is_bounded() -> None:
    settings = StreamSettings(min_prompts=4, max_prompts=6, max_clusters=3)
    stream = PromptStream(settings)
    for i, v in enumerate(task_vectors(0, 30, spread=0.2)):
        stream.add(str(i), v)
    kept = stream.prompts(0)
    assert len(kept) == 6 and stream.sizes() == {0: 30} and any(int(p) >= 6 for p in kept)
    for t in (1, 2):
        stream.add("new", task_vectors(t, 1)[0])
    stream.add("again", task_vectors(0, 1, seed=1, spread=0.2)[0])  # 0 is the latest used, 1 the longest unused
    stream.add("new", task_vectors(3, 1)[0])
    assert set(stream.sizes()) == {0, 2, 3} and stream._sums is not None and len(stream._sums) == 3


def test_a_merge_keeps_its_bound_and_both_sides() -> None:
    apart, between = split_then_bridged()
    settings = StreamSettings(min_prompts=10, max_prompts=10, join=0.9, merge=0.8, merge_size=8)
    stream = PromptStream(settings)
    for i, v in enumerate(apart):
        stream.add("left" if i < 20 else "right", v)
    for v in between:
        stream.add("right", v)
    assert len(stream.sizes()) == 1
    kept = Counter(stream.prompts(next(iter(stream.sizes()))))
    assert sum(kept.values()) == 10 and kept["left"] >= 1 and kept["right"] >= 1


def test_sums_are_the_sums() -> None:
    stream = PromptStream(SMALL)
    for prompt, v in mixed():
        stream.add(prompt, v)
    assert stream._sums is not None
    whole = torch.stack([v for _, v in mixed()]).sum(dim=0)
    assert torch.allclose(stream._sums.sum(dim=0), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("vector", "match"),
    [
        (torch.ones(WIDTH), "not L2-normalised"),
        (torch.full((WIDTH,), float("nan")), "NaN"),
        (task_vectors(0, 1, width=9), rf"expected \(n, {WIDTH}\)"),
        (task_vectors(0, 2), "one embedding, got 2"),
    ],
)
def test_unusable_embeddings_change_nothing(vector: torch.Tensor, match: str) -> None:
    stream = PromptStream(SMALL)
    stream.add("a", task_vectors(0, 1))
    with pytest.raises(InputError, match=match):
        stream.add("b", vector)
    assert stream.sizes() == {0: 1} and stream.prompts(0) == ["a"]


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="min_prompts 32 is above max_prompts 8"):
        StreamSettings(max_prompts=8)
    with pytest.raises(ConfigError, match="join must be within"):
        StreamSettings(join=0.0)
    with pytest.raises(ConfigError, match="max_clusters must be"):
        StreamSettings(max_clusters=0)


def test_saved_stream_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole, half = PromptStream(SMALL, encoder="e"), PromptStream(SMALL, encoder="e")
    pairs = mixed(3, 12)  # fewer prompts than are kept, so no draw of the reservoir differs
    expected = [whole.add(*pair) for pair in pairs]
    found = [half.add(*pair) for pair in pairs[:15]]
    half.save(tmp_path)
    again = PromptStream.load(tmp_path, SMALL, encoder="e")
    assert again is not None
    assert found + [again.add(*pair) for pair in pairs[15:]] == expected
    assert all(again.prompts(i) == whole.prompts(i) for i in whole.sizes())


def test_an_empty_stream_is_saved_too(tmp_path: Path) -> None:
    PromptStream().save(tmp_path)
    again = PromptStream.load(tmp_path)
    assert again is not None and again.sizes() == {}


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: (d / STATE_FILE).unlink(),
        lambda d: (d / SUMS_FILE).unlink(),
        lambda d: (d / SUMS_FILE).write_bytes(b"torn"),
        lambda d: save_file({"sums": torch.ones(1, WIDTH)}, d / SUMS_FILE),
        lambda d: (d / STATE_FILE).write_text("{"),
        lambda d: (d / STATE_FILE).write_text("[]"),
        lambda d: rewrite(d, clusters=[]),
        lambda d: rewrite(d, clusters=[{"name": 1}]),
        lambda d: rewrite(d, clusters=[{"id": 0, "n": 1, "prompts": [7]}]),
        lambda d: rewrite(d, clusters=[{"id": "0", "n": 1, "prompts": ["a"]}]),
        lambda d: rewrite(d, clusters=[{"id": 0, "n": 0, "prompts": []}]),
        lambda d: rewrite(d, encoder="other"),
        lambda d: rewrite(d, format_version=9),
        lambda d: rewrite(d, next_id=None),
    ],
)
def test_a_damaged_stream_starts_afresh(tmp_path: Path, harm) -> None:  # type: ignore[no-untyped-def]
    stream = PromptStream()
    stream.add("a", task_vectors(0, 1))
    stream.save(tmp_path)
    harm(tmp_path)
    assert PromptStream.load(tmp_path) is None


def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        PromptStream().save(tmp_path / "file" / "state")


def test_threads_lose_nothing() -> None:
    stream, seen = PromptStream(SMALL), []

    def feed(t: int) -> None:
        for i, v in enumerate(task_vectors(t, 40, spread=0.3)):
            seen.append(stream.add(f"{t} {i}", v))

    threads = [threading.Thread(target=feed, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stream.sizes().values()) == [40] * 4 and sum(s.ready for s in seen) == 4
