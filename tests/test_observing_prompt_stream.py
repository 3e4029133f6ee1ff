"""The prompt stream: tasks found in a shuffled mix, bounds kept, state saved."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest
import torch
from routing_parts import WIDTH, task_vectors

from dnd_sdk.errors import AdapterNotFoundError, ConfigError, InputError
from dnd_sdk.observing.prompt_stream import MAX_KEPT_CHARS, Choice, PromptStream, StreamSettings

SMALL = StreamSettings(min_prompts=10, max_prompts=16)


def mixed(n_tasks: int = 5, size: int = 30, *, spread: float = 0.7, seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    """A stream of (prompt "task number", vector), shuffled by the seed."""
    pairs = [
        (f"{t} {i}", v) for t in range(n_tasks) for i, v in enumerate(task_vectors(t, size, spread=spread, width=256))
    ]
    random.Random(seed).shuffle(pairs)
    return pairs


@pytest.mark.parametrize("seed", range(4))
def test_a_mix_in_any_order_is_sorted_into_its_tasks(seed: int) -> None:
    stream = PromptStream(SMALL)
    for prompt, v in mixed(seed=seed):
        stream.add(prompt, v)
    kept = [Counter(p.split()[0] for p in stream.prompts(c)) for c in stream.sizes()]
    assert sorted(task for counts in kept for task in counts) == ["0", "1", "2", "3", "4"]  # pure, each once
    assert sorted(stream.sizes().values()) == [30] * 5


def test_each_task_keeps_its_cluster_from_first_to_last() -> None:
    stream, clusters = PromptStream(SMALL), {}
    for prompt, v in mixed(spread=0.4):
        clusters.setdefault(prompt.split()[0], set()).add(stream.add(prompt, v).cluster_id)
    assert {len(ids) for ids in clusters.values()} == {1}


def test_a_choice_is_told_with_every_later_prompt() -> None:
    stream, vectors = PromptStream(SMALL), task_vectors(0, 6, spread=0.2)
    seen = [stream.add("p", v) for v in vectors[:4]]
    assert [(s.size, s.choice) for s in seen] == [(n, None) for n in range(1, 5)]
    stream.choose(seen[0].cluster_id, Choice("generate", "id"))
    later = [stream.add("p", v) for v in vectors[4:]]
    assert [(s.choice, s.chosen_at) for s in later] == [(Choice("generate", "id"), 4)] * 2
    stream.choose(99, Choice("base", None))  # gone: passed over
    assert stream.choice(seen[0].cluster_id) == Choice("generate", "id")


def test_a_late_look_does_not_undo_a_final_choice() -> None:
    stream = PromptStream(SMALL)
    cluster = stream.add("p", task_vectors(0, 1)[0]).cluster_id
    early, late, made = (Choice("reuse", "x", final=False), Choice("reuse", "y", final=False), Choice("generate", "id"))
    for choice, then in ((early, early), (late, late), (made, made), (early, made), (None, None), (early, early)):
        stream.choose(cluster, choice)
        assert stream.choice(cluster) == then


def test_kept_prompts_have_their_own_embeddings_and_long_ones_are_cut() -> None:
    stream = PromptStream(SMALL)
    vectors = dict(mixed(1, 100))
    for prompt, v in vectors.items():
        stream.add(prompt, v)
    for cluster in stream.sizes():
        prompts = stream.prompts(cluster)
        assert len(prompts) <= 16
        assert torch.equal(stream.vectors(cluster), torch.stack([vectors[p] for p in prompts]))
    seen = stream.add("a" * MAX_KEPT_CHARS + "b" * MAX_KEPT_CHARS, task_vectors(7, 1, width=256))
    half = MAX_KEPT_CHARS // 2
    assert stream.prompts(seen.cluster_id) == ["a" * half + "b" * half]


def test_kept_prompts_are_a_fair_sample() -> None:
    """Every prompt is as likely to be kept: of 4 kept of 40, the mean position is about the middle."""
    places = []
    for start in range(100):
        stream = PromptStream(StreamSettings(min_prompts=4, max_prompts=4))
        stream.seen = 1000 * start
        v = task_vectors(0, 1)[0]
        for i in range(40):
            stream.add(str(i), v)
        places += [int(p) for p in stream.prompts(0)]
    assert 17.5 < sum(places) / len(places) < 21.5  # 19.5, standard error 0.6


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
    assert stream.sums is not None
    assert torch.allclose(stream.sums[0], torch.stack(apart + between).sum(dim=0), atol=1e-4)
    assert len({s.cluster_id for s in seen}) <= 2
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
    assert set(stream.sizes()) == {0, 2, 3} and stream.sums is not None and len(stream.sums) == 3


def test_ever_different_prompts_do_not_grow_it() -> None:
    stream = PromptStream(StreamSettings(min_prompts=4, max_prompts=4, max_clusters=8))
    vectors = torch.nn.functional.normalize(torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    for i, v in enumerate(vectors):
        stream.add(f"prompt {i}", v)
        assert len(stream.clusters) <= 8 and stream.sums is not None and len(stream.sums) == len(stream.clusters)
    assert stream.next_id > 100, "the test should have dropped many"
    kept = [v for c in stream.clusters for v in c.vectors]
    assert len(kept) <= 32 and all(v.untyped_storage().nbytes() == 4 * WIDTH for v in kept)


@pytest.mark.parametrize(
    ("left", "right", "kept"),
    [
        (None, Choice("reuse", "r"), Choice("reuse", "r")),
        (Choice("generate", "l"), None, Choice("generate", "l")),
        (Choice("reuse", "l", final=False), Choice("base", None), Choice("base", None)),
    ],
)
def test_a_merge_keeps_the_choice_that_counts_most(left: Choice | None, right: Choice | None, kept: Choice) -> None:
    apart, between = split_then_bridged()
    stream = PromptStream(StreamSettings(min_prompts=30, join=0.9, merge=0.8, merge_size=8))
    ids = [stream.add("x", v).cluster_id for v in apart]
    stream.choose(ids[0], left)
    stream.choose(ids[-1], right)
    for v in between:
        last = stream.add("y", v)
    assert last.choice == kept and len(stream.sizes()) == 1


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
    assert stream.sums is not None
    whole = torch.stack([v for _, v in mixed()]).sum(dim=0)
    assert torch.allclose(stream.sums.sum(dim=0), whole, atol=1e-4)


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
    assert sorted(stream.sizes().values()) == [40] * 4 and len(seen) == 160
