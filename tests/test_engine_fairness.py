"""Nobody waits for ever: steps until a request begins, whatever else is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_parts import PROMPTS, adapted_engine, ask, ask_all, strong, tiny_base, tiny_layout

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine, Generation
from dnd_sdk.engine.forward import FlatForward
from dnd_sdk.errors import BankFullError, BusyError

SHORT, LONG = SamplingOptions(max_new_tokens=4), SamplingOptions(max_new_tokens=300)


def fetching(n_slots: int, **settings: Any) -> Engine:
    """An engine that fetches adapters "a" to "z"."""
    base = tiny_base(layers=1)
    layout = tiny_layout(base)
    return Engine(base, layout, n_slots=n_slots, fetch=lambda name: strong(layout, ord(name) - ord("a")), **settings)


Then = dict[int, Callable[[], Any]]


@pytest.fixture
def then(monkeypatch: pytest.MonkeyPatch) -> Then:
    """What is called before which step of any engine."""
    calls: Then = {}
    run, n = FlatForward.run, [0]

    def counted(self: FlatForward, *args: Any) -> torch.Tensor:
        if threading.current_thread().name == "dnd-engine":
            n[0] += 1
            calls.pop(n[0], list)()
        return run(self, *args)

    monkeypatch.setattr(FlatForward, "run", counted)
    return calls


def steps_until_done(engine: Engine, then: Then, adapter: str | None, among: list[CompletionRequest]) -> int:
    """Steps that a request of one token takes which comes in the tenth step of a list."""
    before, after = [0], [0]
    asked: list[Future[Generation]] = []

    def come() -> None:
        before[0] = engine._scheduler._n_steps
        asked.append(engine.submit(CompletionRequest("hi", adapter, SamplingOptions(max_new_tokens=1))))
        asked[0].add_done_callback(lambda _: after.append(engine._scheduler._n_steps))

    then[10] = come
    engine.complete(among)
    assert asked[0].result().completion_tokens == 1
    return after[-1] - before[0]


@pytest.mark.parametrize(("n_slots", "adapter", "at_most"), [(1, "b", 80), (2, "b", 10), (1, None, 10), (1, "a", 40)])
def test_a_list_for_one_adapter_lets_others_in(then: Then, n_slots: int, adapter: str | None, at_most: int) -> None:
    engine = fetching(n_slots, max_batch=4)
    assert steps_until_done(engine, then, adapter, [CompletionRequest("q", "a", SHORT)] * 500) <= at_most


def test_a_request_that_needs_much_memory_is_let_in(then: Then) -> None:
    engine = fetching(1, max_batch=4)
    engine._scheduler._kv_bytes = 110 * engine._scheduler._forward.token_bytes
    many = [CompletionRequest("q" * (60 if i == 9 else 1), None, SHORT) for i in range(500)]
    ended: list[int] = []
    engine.submit(many[0]).result()
    one = engine.submit(CompletionRequest("q" * 60, "a", SHORT))
    one.add_done_callback(lambda _: ended.append(engine._scheduler._n_steps))
    engine.complete(many)
    assert ended and ended[0] < 120


def test_short_prompts_and_a_long_one_share_the_steps(then: Then) -> None:
    engine = fetching(1, max_batch=4)
    engine._scheduler._large_piece = engine._scheduler._piece = 16
    long = CompletionRequest("long " * 60, None, SamplingOptions(max_new_tokens=1))  # 20 pieces
    ended: dict[str, int] = {}
    asked: list[Future[Generation]] = []

    def come() -> None:
        for name, request in (("long", long), ("short", CompletionRequest("x", "a", SHORT))):
            asked.append(engine.submit(request))
            asked[-1].add_done_callback(lambda _, name=name: ended.setdefault(name, engine._scheduler._n_steps))

    all_are_in = threading.Event()
    then[1], then[10] = all_are_in.wait, come
    one = CompletionRequest("q" * 20, None, SamplingOptions(max_new_tokens=1))
    among = [engine.submit(one) for _ in range(300)]
    all_are_in.set()
    assert all(answer.result().completion_tokens == 1 for answer in among)
    assert all(answer.result().completion_tokens for answer in asked)
    assert ended["long"] < 120 and ended["short"] < 60


@contextmanager
def scoring(engine: Engine, adapter: str) -> Iterator[list[Any]]:
    """A thread that scores with an adapter, again and again, and the scores it had."""
    scores: list[Any] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            scores.append(engine.option_logprobs(PROMPTS[:2], [adapter] * 2, ["yes", "no"]).tolist())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield scores
    finally:
        stop.set()
        thread.join()


def test_one_slot_and_three_adapters_beside_scoring() -> None:
    engine = fetching(1, max_batch=4)
    want = engine.option_logprobs(PROMPTS[:2], ["d"] * 2, ["yes", "no"]).tolist()
    adapters = ["abc"[i % 3] for i in range(18)]
    single = {a: ask(engine, "hi", a, SHORT) for a in "abc"}
    with scoring(engine, "d") as scores:
        assert ask_all(engine, ["hi"] * 18, adapters, SHORT) == [single[a] for a in adapters]
    assert scores and all(score == want for score in scores)


def test_scoring_gets_a_slot_that_a_list_always_uses(then: Then) -> None:
    engine = fetching(1, max_batch=4)
    scored: list[int] = []

    def score() -> None:
        engine.option_logprobs(["hi"], ["b"], ["yes", "no"])
        scored.append(engine._scheduler._n_steps)

    thread = threading.Thread(target=score)
    then[10] = thread.start
    engine.complete([CompletionRequest("q", "a", SamplingOptions(max_new_tokens=8))] * 300)
    thread.join()
    assert scored[0] < 60


def test_decoding_goes_on_beside_work_that_takes_turns() -> None:
    engine = adapted_engine(layers=1)
    single = ask(engine, "hi", "a", LONG)
    stream = engine.stream(CompletionRequest("hi", "a", LONG))
    next(stream)
    seen = []
    with engine.trying(strong(engine.layout, 5)) as turn:
        for _ in range(250):  # how soon the other thread asks for its turn is not in our hands, that it gets one is
            engine.base.model(input_ids=torch.tensor([[1, 2, 3]]))
            seen.append(engine._scheduler._n_steps)
            turn.step()
    "".join(stream)
    assert stream.generation == single
    assert len(set(seen)) > 10


def test_a_users_lease_and_pins_leave_the_rest_running() -> None:
    engine = fetching(2, max_batch=4)
    single = {a: ask(engine, "hi", a, SHORT) for a in (None, "a", "b", "c")}
    engine.bank.load("a", strong(engine.layout, 0))
    engine.bank.pin("a")
    adapters = [(None, "a", "b", "c")[i % 4] for i in range(200)]
    with engine.bank.lease(["a"]):
        assert ask_all(engine, ["hi"] * 200, adapters, SHORT) == [single[a] for a in adapters]
    engine.bank.wait_s = 0.2
    with engine.bank.lease(["a", "c"]):
        late = engine.submit(CompletionRequest("hi", "b", SHORT))
        rest = [(None, "a", "c")[i % 3] for i in range(300)]
        assert ask_all(engine, ["hi"] * 300, rest, SHORT) == [single[a] for a in rest]
        with pytest.raises(BankFullError):
            late.result(30)
        waits = engine.submit(CompletionRequest("hi", "b", SHORT))
    assert waits.result(30) == single["b"]


def test_too_many_waiting_is_said_and_a_long_list_still_runs(then: Then) -> None:
    engine = fetching(1, max_batch=2, max_waiting=3)
    single = ask(engine, "q", "a", SHORT)
    assert ask_all(engine, ["q"] * 50, ["a"] * 50, SHORT) == [single] * 50
    refused: list[BaseException] = []
    taken: list[Future[Generation]] = []

    def flood() -> None:
        for _ in range(9):
            try:
                taken.append(engine.submit(CompletionRequest("q", "a", SHORT)))
            except BusyError as e:
                refused.append(e)

    n = engine._scheduler._n_steps
    then[n + 1] = flood
    then[2 * n + 2] = flood
    ask(engine, "q", "a", SHORT)
    assert refused and taken and {f.result() for f in taken} == {single}
    assert ask(engine, "q", "a", SHORT) == single


def test_a_short_prompt_is_read_in_a_step_of_its_own_before_a_long_one_goes_on(
    then: Then, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, read = fetching(1), list[list[int]]()
    run = FlatForward.run
    monkeypatch.setattr(
        FlatForward,
        "run",
        lambda self, writing, reading: read.append([n for _, n in reading]) or run(self, writing, reading),
    )
    one = SamplingOptions(max_new_tokens=1)
    long, short = "so long " * 55, "hi"
    n_long, n_short = (len(engine.prompt_ids(text, 1)) for text in (long, short))
    engine._scheduler._large_piece = 64
    later: list[Future[Generation]] = []
    then[1] = lambda: later.append(engine.submit(CompletionRequest(short, None, one)))
    engine.complete([CompletionRequest(long, None, one)])
    assert later[0].result(60).completion_tokens == 1
    assert read[:3] == [[64], [n_short], [64]] and sum(map(sum, read)) == n_long + n_short
