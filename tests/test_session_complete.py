"""Completions, batches and streams of a session, from one thread and from several."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import random_flat
from llamaindex_parts import roomy
from tiny_world import World, prompts_of
from tool_parts import ADD, HERMES_TEMPLATE

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest
from dnd_sdk.errors import AdapterNotFoundError, ConfigError, InputError
from dnd_sdk.routing import read_decisions
from dnd_sdk.session import DnD

NAMES = ("upper", "lower", "digits")


@pytest.fixture
def dnd(world: World) -> DnD:
    return world.session()


def test_completions_name_their_adapter(dnd: DnD) -> None:
    made = dnd.adapt(prompts_of("upper"), name="upper").adapter
    plain, by_value, by_name = (dnd.complete("hello", adapter=a, max_new_tokens=8) for a in (None, made, "upper"))
    assert (plain.adapter, plain.decision) == (None, "base")
    assert (by_name.adapter, by_name.decision) == ("upper", "reuse")
    assert by_name == by_value and by_name.text != plain.text
    assert by_name.usage["prompt_tokens"] == plain.usage["prompt_tokens"] > 5
    assert 1 <= by_name.usage["completion_tokens"] <= 8
    assert dnd.complete([{"role": "user", "content": "hello"}], max_new_tokens=8) == plain


def test_a_removed_adapter_is_not_answered_with_from_what_is_kept_of_it(world: World) -> None:
    dnd, how = world.session(n_slots=1), {"max_new_tokens": 4}
    made = {name: dnd.adapt(prompts_of(name), name=name).adapter for name in NAMES}
    want = {name: dnd.complete("hello", adapter=name, **how) for name in made}
    bank, upper = dnd.engine.bank, made["upper"]
    assert bank.resident() == [made["digits"].id] and set(bank.kept()) == {upper.id, made["lower"].id}
    AdapterStore(world.home).rm("upper")  # as another process does it
    request = CompletionRequest("hello", upper.id, SamplingOptions(**how))
    calls: list[Callable[[], Any]] = [
        lambda: dnd.complete("hello", adapter="upper", **how),
        lambda: dnd.complete("hello", adapter=upper, **how),
        lambda: dnd.stream("hello", adapter=upper, **how),
        lambda: dnd.engine.complete([request]),
        lambda: dnd.engine.stream(request),
        lambda: dnd.engine.submit(request).result(),
    ]
    for call in calls:
        with pytest.raises(AdapterNotFoundError):
            call()
    assert bank.kept() == [made["lower"].id]
    for name in ("lower", "digits", "lower"):
        assert dnd.complete("hello", adapter=name, **how) == want[name]


def test_who_comes_back_from_what_is_kept_is_not_read_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd, how = world.session(n_slots=1), {"max_new_tokens": 4}
    want = {name: dnd.adapt(prompts_of(name), name=name) and dnd.complete("hello", name, **how) for name in NAMES}
    monkeypatch.setattr(AdapterStore, "load", lambda *_, **__: pytest.fail("it was read"))
    for name in (*NAMES, *NAMES):
        assert dnd.complete("hello", adapter=name, **how) == want[name]
    dnd.close()
    assert (dnd.engine.bank.resident(), dnd.engine.bank.kept()) == ([], [])


def test_auto_routes_a_single_prompt(world: World) -> None:
    dnd = world.session(reuse=0.98)
    made = dnd.adapt(prompts_of("lower"), name="cats").adapter
    assert dnd.complete("the cat 7 sat on it", adapter="auto", max_new_tokens=4).adapter == made.name
    assert dnd.complete("0123456789 ** 99 !!", adapter="auto", max_new_tokens=4).decision == "base"
    assert dnd.route("the cat 7 sat on it").adapter == made
    chat = [{"role": "system", "content": "0 1 2"}, {"role": "user", "content": "the cat 7 sat on it"}]
    assert dnd.complete(chat, adapter="auto", max_new_tokens=4).adapter == made.name
    with pytest.raises(InputError, match="no user message"):
        dnd.complete([{"role": "system", "content": "x"}], adapter="auto")


def test_with_tools_on_offer_auto_is_the_base_and_a_name_is_its_adapter(world: World) -> None:
    dnd = roomy(world.session(reuse=0.98))
    dnd.base.tokenizer.chat_template = HERMES_TEMPLATE
    dnd.adapt(prompts_of("lower"), name="cats")
    asked, how = "the cat 7 sat on it", {"max_new_tokens": 4}
    assert dnd.complete(asked, "auto", **how).adapter == "cats" == dnd.complete(asked, "auto", tools=[], **how).adapter
    streamed = dnd.stream(asked, "auto", tools=[ADD], **how).result
    for answer in (dnd.complete(asked, "auto", tools=[ADD], **how), streamed):
        assert (answer.adapter, answer.decision) == (None, "base")
    assert dnd.complete(asked, "cats", tools=[ADD], **how).adapter == "cats"
    logged, _ = read_decisions(world.home.logs)
    told = [(d.decision, d.by, d.score is None) for d in logged if d.kind == "auto"]
    assert told == [("reuse", "scores", False)] * 2 + [("base", "tools", True)] * 2
    assert "tools are on offer" in logged[-1].reason


def test_a_batch_of_mixed_adapters_equals_one_by_one(dnd: DnD) -> None:
    names = [dnd.adapt(prompts_of(t), name=t).adapter.name for t in ("upper", "lower", "digits")]
    prompts, adapters = ["hello", "hello", "what", "why not"], [*names, None]
    together = dnd.complete_batch(prompts, adapters=adapters, max_new_tokens=6)
    assert together == [dnd.complete(p, adapter=a, max_new_tokens=6) for p, a in zip(prompts, adapters, strict=True)]
    assert [c.adapter for c in together] == adapters
    assert dnd.complete_batch(["hello"], max_new_tokens=6)[0].decision == "base"


def test_a_list_with_more_adapters_than_slots_is_answered(world: World) -> None:
    few, many = world.session(n_slots=1), world.session(n_slots=4)
    adapters = [few.adapt(prompts_of(task), name=task).adapter for task in ("upper", "digits", "lower")] * 2
    want = [many.complete("hello", a, max_new_tokens=6) for a in adapters]
    assert few.complete_batch(["hello"] * 6, adapters=adapters, max_new_tokens=6) == want
    assert len({w.text for w in want}) == 3 and len(few.engine.bank.resident()) == 1


def test_with_one_seed_the_rows_of_a_batch_draw_apart(dnd: DnD) -> None:
    warm = {"max_new_tokens": 8, "temperature": 1.0}
    first, second = dnd.complete_batch(["hello", "hello"], seed=5, **warm)
    assert [first, second] == [dnd.complete("hello", seed=seed, **warm) for seed in (5, 6)] and first != second


def test_streamed_pieces_join_to_the_whole_answer(dnd: DnD) -> None:
    made = dnd.adapt(prompts_of("upper")).adapter
    stream = dnd.stream("hello", adapter=made, max_new_tokens=12)
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text
    assert stream.result == dnd.complete("hello", adapter=made, max_new_tokens=12)
    assert dnd.stream("hello", max_new_tokens=5).result == dnd.complete("hello", max_new_tokens=5)


def test_a_cancelled_stream_ends_early_and_has_a_result(dnd: DnD) -> None:
    with torch.no_grad():
        dnd.base.model.get_output_embeddings().weight[dnd.base.tokenizer.eos_token_id] = 0.0  # it never ends by itself
    assert dnd.complete("hello", max_new_tokens=200).usage["completion_tokens"] == 200
    stream = dnd.stream("hello", max_new_tokens=200)
    next(stream)
    stream.cancel()
    assert stream.result.usage["completion_tokens"] < 200
    with dnd.stream("hello", max_new_tokens=400) as closed:
        next(closed)
    with pytest.raises(RuntimeError, match="closed before its end"):
        _ = closed.result


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda d: d.complete("x", adapter="nope"), AdapterNotFoundError, "no adapter 'nope'"),
        (lambda d: d.complete("x", heat=1), ConfigError, "unknown sampling option.*heat"),
        (lambda d: d.complete("x", temperature=-1.0), ConfigError, "temperature must be"),
        (lambda d: d.complete("x" * 9999), InputError, "at most .* fit"),
        (lambda d: d.complete([]), InputError, "no messages"),
        (lambda d: d.complete_batch("x"), InputError, "must be a list"),
        (lambda d: d.complete_batch(["x"], adapters=[None, None]), InputError, "1 prompts but 2 adapters"),
    ],
)
def test_bad_requests(dnd: DnD, call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(dnd)


def test_adapters_beyond_the_slots_come_back_on_demand(world: World) -> None:
    dnd = world.session(n_slots=1)
    for task in ("upper", "lower", "digits"):
        dnd.adapt(prompts_of(task), name=task)
    fresh = {t: world.session().complete("hello", adapter=t, max_new_tokens=6) for t in ("upper", "lower", "digits")}
    for task in ("upper", "digits", "upper", "lower"):
        assert dnd.complete("hello", adapter=task, max_new_tokens=6) == fresh[task]
        assert len(dnd.engine.bank.resident()) == 1


def test_four_threads_get_what_one_thread_gets(world: World) -> None:
    """8 adapters in 6 slots, 4 x 250 calls: nothing is mixed up."""
    dnd = world.session(n_slots=6)
    store = dnd.store
    names: list[str | None] = [None]
    for i in range(8):
        flat = random_flat(dnd.layout, seed=i, std=0.3)
        names.append(
            store.put(
                flat,
                dnd.layout,
                base_name="tiny",
                base_fingerprint=dnd.base.fingerprint,
                source="trained",
                name=f"t{i}",
            ).name
        )
    calls = [(f"question {i % 13}", names[(7 * i) % len(names)]) for i in range(250)]
    expected = {c: dnd.complete(c[0], adapter=c[1], max_new_tokens=2) for c in set(calls)}
    assert len({e.text for e in expected.values()}) > 20
    start = threading.Barrier(4)

    def work(seed: int) -> list[bool]:
        start.wait()
        order = [calls[(i * 17 + seed) % len(calls)] for i in range(len(calls))]
        return [dnd.complete(p, adapter=a, max_new_tokens=2) == expected[(p, a)] for p, a in order]

    with ThreadPoolExecutor(4) as pool:
        results = [ok for part in pool.map(work, range(4)) for ok in part]
    assert len(results) == 1000 and all(results)


def test_threads_adapting_the_same_prompts_make_one_adapter(dnd: DnD) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: dnd.adapt(prompts_of("upper")), range(4)))
    assert sorted(r.decision for r in found) == ["generate", "reuse", "reuse", "reuse"]
    assert len({r.adapter for r in found}) == len(dnd.store.ls()) == 1
