"""Many threads, many adapters, one base: every output equals the single-threaded one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_parts import PROMPTS, ask, ask_all, strong, tiny_base, tiny_layout

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine

ADAPTERS = [f"adapter-{i}" for i in range(8)]
OPTIONS = SamplingOptions(max_new_tokens=2)
THREADS, CALLS = 4, 250


@pytest.mark.parametrize("n_slots", [8, 3])
def test_a_thousand_calls_from_four_threads(n_slots: int) -> None:
    engine = _engine(n_slots)
    jobs = [(PROMPTS[i % 5], [None, *ADAPTERS][(i * 7) % 9]) for i in range(THREADS * CALLS)]
    single = {job: ask(engine, *job, OPTIONS) for job in dict.fromkeys(jobs)}
    assert len({g.text for g in single.values()}) > 20
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(lambda job: ask(engine, *job, OPTIONS), jobs))
    assert [i for i, job in enumerate(jobs) if answers[i] != single[job]] == []


def _engine(n_slots: int) -> Engine:
    """One that fetches `ADAPTERS`."""
    base = tiny_base(layers=1)
    layout = tiny_layout(base)
    return Engine(base, layout, n_slots=n_slots, fetch=lambda name: strong(layout, ADAPTERS.index(name)))


def test_batches_streams_and_scores_at_once() -> None:
    engine = _engine(2)

    def batch(i: int) -> object:
        return ask_all(engine, PROMPTS, [ADAPTERS[(i + j) % 8] for j in range(5)], OPTIONS)

    def stream(i: int) -> object:
        options = SamplingOptions(max_new_tokens=6)
        return "".join(engine.stream(CompletionRequest(PROMPTS[i % 5], ADAPTERS[i % 8], options)))

    def score(i: int) -> object:
        return engine.option_logprobs(PROMPTS[:2], [None, ADAPTERS[i % 8]], ["yes", "no"]).tolist()

    jobs = [(work, i) for i in range(8) for work in (batch, stream, score)]
    single = [work(i) for work, i in jobs]
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda job: job[0](job[1]), jobs)) == single
