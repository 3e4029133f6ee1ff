"""Shared heads of prompts: found as a slow search finds them, within their bytes, never another adapter's."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_sdk.engine.prompt_store import MIN_SHARED, PromptStore, alike

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6).flatmap(
    lambda end: st.integers(14, 40).map(lambda n: [7] * n + end)
)
STEPS = st.lists(st.tuples(st.sampled_from(["a", "b", ("a", 2), None]), TOKENS, st.integers(1, 46)), max_size=30)


def kv_of(adapter: object, prompt: list[int]) -> torch.Tensor:
    """What this adapter makes of a prompt `(1, 2, n, 1, 1)`: no two alike by their owner and tokens so far."""
    sums = [float(hash((str(adapter), tuple(prompt[: i + 1]))) % 1_000_003) for i in range(len(prompt))]
    return torch.tensor(sums, dtype=torch.float32)[None, None, :, None, None].repeat(1, 2, 1, 1, 1)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, max_tokens=st.integers(0, 150))
def test_heads_are_the_longest_and_the_owners(steps: list[tuple[object, list[int], int]], max_tokens: int) -> None:
    token_bytes = kv_of("a", [0]).nbytes
    store = PromptStore(max_tokens * token_bytes, token_bytes)
    for adapter, prompt, n in steps:
        kept = [(owner, tokens.tolist()) for owner, tokens, _ in store._heads.values()]
        shared = [min(common(head, prompt), len(prompt) - 1) for owner, head in kept if owner == adapter]
        want = max((common(head, prompt) for owner, head in kept if owner == adapter), default=0)
        known = store.known(adapter, prompt)
        if want < MIN_SHARED:
            assert known is None
        else:
            assert known is not None and known.shape[2] == max(shared)
            assert torch.equal(known, kv_of(adapter, prompt)[:, :, : known.shape[2]])
        worth = store.worth(adapter, prompt, [], 0 if known is None else known.shape[2])
        assert worth < len(prompt) and worth * token_bytes <= max_tokens * token_bytes
        head = prompt[:n]
        store.keep(adapter, head, kv_of(adapter, head))
        sizes = [kv.nbytes for _, _, kv in store._heads.values()]
        assert store.n_bytes == sum(sizes) <= max_tokens * token_bytes
        if len(head) <= max_tokens:
            again = store.known(adapter, [*head, 99])
            assert len(head) < MIN_SHARED or (again is not None and again.shape[2] == len(head))
    store.clear()
    assert store.n_bytes == 0 and all(store.known(adapter, prompt) is None for adapter, prompt, _ in steps)


def common(some: list[int], others: list[int]) -> int:
    """By hand."""
    n = 0
    while n < min(len(some), len(others)) and some[n] == others[n]:
        n += 1
    assert n == alike(some, others)
    return n


def test_the_least_recently_used_head_goes_first() -> None:
    heads = {name: [ord(name)] * 20 for name in "abc"}
    store = PromptStore(2 * kv_of("x", heads["a"]).nbytes, kv_of("x", [0]).nbytes)
    for name in "ab":
        store.keep("x", heads[name], kv_of("x", heads[name]))
    assert store.known("x", [*heads["a"], 1]) is not None
    store.keep("x", heads["c"], kv_of("x", heads["c"]))
    assert [store.known("x", [*heads[name], 1]) is None for name in "abc"] == [False, True, False]


def test_a_head_too_large_to_keep_is_not_waited_for() -> None:
    prompt = list(range(40))
    store = PromptStore(20 * kv_of("x", [0]).nbytes, kv_of("x", [0]).nbytes)
    store.keep("x", [5] * 10, kv_of("x", [5] * 10))
    assert store.worth("x", prompt, [prompt], 0) <= 20
