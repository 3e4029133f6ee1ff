"""Requests of one list may differ in everything, and each comes out as it would alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from engine_parts import PROMPTS, adapted_engine, strong
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine, Generation

OPTIONS = st.builds(
    SamplingOptions,
    max_new_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), (), ("e",), ("a", "\N{REPLACEMENT CHARACTER}")]),
)
REQUESTS = st.builds(
    CompletionRequest,
    st.sampled_from([p + " more" * n for p in PROMPTS for n in range(3)]),
    st.sampled_from([None, "a", "b"]),
    OPTIONS,
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return adapted_engine(n_slots=2, max_batch=6)


def alone(engine: Engine, request: CompletionRequest) -> Generation:
    return engine.complete([request])[0]


@settings(deadline=None, max_examples=25)
@given(st.lists(REQUESTS, max_size=9))
def test_a_mixed_list_equals_its_requests_one_by_one(engine: Engine, requests: list[CompletionRequest]) -> None:
    assert engine.complete(requests) == [alone(engine, r) for r in requests]


def test_the_property_above_sees_every_kind_of_end(engine: Engine) -> None:
    rng = random.Random(0)
    requests = [
        CompletionRequest(
            PROMPTS[i % 5],
            ("a", None, "b")[i % 3],
            SamplingOptions(rng.randint(1, 12), rng.choice([0.0, 1.0]), seed=i, stop=rng.choice([(), ("e",)])),
        )
        for i in range(40)
    ]
    answers = engine.complete(requests)
    assert answers == [alone(engine, r) for r in requests]
    assert {a.finish_reason for a in answers} == {"stop", "length"} and len({a.text for a in answers}) > 20
    assert len({a.completion_tokens for a in answers if a.finish_reason == "length"}) > 5


@pytest.fixture
def after_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, threading.Event], list[int]]:
    """Sets an event when the model has made so many tokens; tells how many it made."""

    def arrange(n: int, event: threading.Event) -> list[int]:
        made, sampled = [0], engine.base.model.forward

        def forward(*args: Any, **inputs: Any) -> Any:
            made[0] += 1
            if made[0] == n:
                event.set()
            return sampled(*args, **inputs)

        monkeypatch.setattr(engine.base.model, "forward", forward)
        return made

    return arrange


@pytest.mark.parametrize("stop", [(), ("never said",)])
def test_a_cancel_ends_its_own_row_and_no_other(
    engine: Engine, after_tokens: Callable[[int, threading.Event], list[int]], stop: tuple[str, ...]
) -> None:
    cancel, options = threading.Event(), SamplingOptions(max_new_tokens=12, stop=stop)
    requests = [CompletionRequest("hi", name, options) for name in ("a", "b", "a")]
    want = [alone(engine, r) for r in requests]
    requests[1] = CompletionRequest("hi", "b", options, cancel=cancel)
    after_tokens(4, cancel)
    first, ended, last = engine.complete(requests)
    assert [first, last] == [want[0], want[2]]
    assert (ended.finish_reason, ended.completion_tokens) == ("cancelled", 4)
    assert want[1].completion_tokens == 12 and want[1].text.startswith(ended.text)


def test_who_is_cancelled_before_the_start_says_nothing(engine: Engine) -> None:
    cancel, options = threading.Event(), SamplingOptions(max_new_tokens=5)
    cancel.set()
    kept, ended = CompletionRequest("hi", "a", options), CompletionRequest("x", "b", options, cancel=cancel)
    for requests in ([ended], [kept, ended], [ended, ended]):
        for request, got in zip(requests, engine.complete(requests), strict=True):
            if request is kept:
                assert got == alone(engine, kept)
            else:
                assert (got.text, got.completion_tokens, got.finish_reason) == ("", 0, "cancelled")
    assert engine.bank.evict("b") and engine.bank.load("b", strong(engine.layout, 1)) is None  # nothing stayed leased


def test_the_whole_list_ends_when_all_are_cancelled(
    engine: Engine, after_tokens: Callable[[int, threading.Event], list[int]]
) -> None:
    cancel = threading.Event()
    made = after_tokens(3, cancel)
    options = SamplingOptions(max_new_tokens=100)
    answers = engine.complete([CompletionRequest(p, "a", options, cancel=cancel) for p in PROMPTS * 3])
    assert [a.finish_reason for a in answers] == ["cancelled"] * 15 and made[0] == 3
    assert {a.completion_tokens for a in answers} <= {0, 1, 2, 3}


def test_a_deadline_ends_a_row_like_a_cancel(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dnd_sdk.engine.row.time.monotonic", lambda: now[0])
    forward = engine.base.model.forward

    def slow(*args: Any, **inputs: Any) -> Any:
        now[0] += 1.0
        return forward(*args, **inputs)

    monkeypatch.setattr(engine.base.model, "forward", slow)
    options = SamplingOptions(max_new_tokens=12)
    got, whole = engine.complete(
        [CompletionRequest("hi", "a", options, deadline_s=5.0), CompletionRequest("hi", "a", options)]
    )
    assert (got.finish_reason, got.completion_tokens) == ("cancelled", 5) and whole.text.startswith(got.text)
    assert whole.completion_tokens == 12
