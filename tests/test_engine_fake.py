"""The fake backend by itself, and a whole session on it, without any base."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_world import World, prompts_of

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, FakeBackend, Generation
from dnd_sdk.errors import ConfigError
from dnd_sdk.evaluation import Parts as EvalParts
from dnd_sdk.session import DnD


@pytest.fixture
def dnd(world: World) -> DnD:
    return world.elsewhere()


def test_the_default_answer_names_the_adapter_and_repeats_the_question(dnd: DnD) -> None:
    backend = FakeBackend(dnd.layout)
    [got] = backend.complete([CompletionRequest([{"role": "user", "content": "how are you"}])])
    assert got == Generation("base: how are you", 3, 5, "stop")
    assert backend.requests == [CompletionRequest([{"role": "user", "content": "how are you"}])]


@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_an_answer_of_tokens_is_read_no_further_than_needed(dnd: DnD, n: int) -> None:
    made: list[str] = []

    def answer(request: CompletionRequest) -> Iterator[str]:
        for word in ("a", " b", " c"):
            made.append(word)
            yield word

    [got] = FakeBackend(dnd.layout, answer).complete([CompletionRequest("hi", options=SamplingOptions(n))])
    assert got.text == "a b c"[: 2 * n - 1] and len(made) == min(n, 3)
    assert (got.finish_reason, got.completion_tokens) == (("stop", 4) if n > 3 else ("length", n))


def test_a_session_without_a_base_adapts_routes_completes_and_streams(dnd: DnD) -> None:
    made = dnd.adapt(prompts_of("upper"), name="upper")
    assert (made.decision, made.adapter and made.adapter.name) == ("generate", "upper")
    assert made.adapter is not None and dnd.engine.held == {made.adapter.id: made.adapter}
    assert dnd.adapt(prompts_of("upper")).decision == "reuse"
    assert dnd.adapt(prompts_of("digits"), name="digits").decision == "generate"
    prompt = prompts_of("upper")[3]
    assert dnd.route(prompt).adapter == made.adapter
    assert dnd.complete(prompt, "auto").text == f"upper: {prompt}"
    assert [c.text for c in dnd.complete_batch(["hi"] * 3, ["digits", None, "upper"])] == [
        "digits: hi",
        "base: hi",
        "upper: hi",
    ]
    stream = dnd.stream("one two three", "digits", max_new_tokens=2)
    assert list(stream) == ["digits:", " one"] and stream.result.finish_reason == "length"
    assert [r.adapter_id for r in dnd.engine.requests][-1] == dnd.store.get("digits").id
    dnd.close()
    assert dnd.engine.held == {} and dnd.complete("hi", "upper").text == "upper: hi"


def test_what_needs_the_base_says_that_it_was_not_done(dnd: DnD) -> None:
    notes = dnd.adapt(prompts_of("upper"), name="upper").notes
    assert notes[-2:] == (
        "not calibrated: the base does not run in this process",
        "not tried on the base: the base does not run in this process",
    )
    assert len(dnd.adapt(prompts_of("lower"), calibrate=False).notes) == 1
    assert dnd.adapt(prompts_of("upper")).notes == ()
    assert "not tried" in dnd.adapt(prompts_of("digits"), mode="merge").notes[-1]
    with pytest.raises(ConfigError, match="an evaluation needs the base in this process"):
        EvalParts.of(dnd)


def test_weights_of_an_unusual_size_are_refused_without_a_base(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnd.generator, "generate", lambda states: torch.full((dnd.layout.n_parameters,), 1e6))
    refused = dnd.adapt(prompts_of("upper"))
    assert refused.decision == "base" and "times the usual norm" in refused.reason and dnd.store.ls() == []
