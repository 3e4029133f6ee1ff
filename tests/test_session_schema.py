"""A session's answers held to a schema, their log-probabilities, and options that thin out what is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from engine_parts import chat_ids
from helpers import read_bytes
from pydantic import BaseModel, Field, field_serializer
from tiny_world import World, prompts_of
from tool_parts import ADD, HERMES_TEMPLATE
from transformers import AutoModelForCausalLM, PreTrainedModel

from dnd_sdk.chat import call_schema, read_answer
from dnd_sdk.engine.forward import FlatForward
from dnd_sdk.errors import ConfigError, DndError
from dnd_sdk.session import CompletionStream, DnD

ROOM = 160
"""Tokens enough for any text that fits the schemas here, one a byte."""


class Parcel(BaseModel):
    """Bounded, so that a random base comes to an end."""

    queue: Literal["billing", "shipping"]
    urgent: bool
    note: str = Field(max_length=6)
    count: int = Field(ge=0, le=99)


PAIR: dict[str, Any] = {
    "type": "object",
    "properties": {"word": {"enum": ["yes", "no"]}, "size": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["word", "size"],
    "additionalProperties": False,
}


def fits_pair(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"word", "size"} and value["word"] in ("yes", "no") and value["size"] in range(1000)


@pytest.fixture
def dnd(world: World) -> DnD:
    return world.session()


@pytest.fixture
def plain(world: World) -> PreTrainedModel:
    """The base as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(world.base).eval()


def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows in every step of the model."""
    seen, run = list[int](), FlatForward.run

    def watched(self: FlatForward, writing: Any, reading: Any) -> torch.Tensor:
        seen.append(len(writing) + len(reading))
        return run(self, writing, reading)

    monkeypatch.setattr(FlatForward, "run", watched)
    return seen


def test_a_dict_its_text_and_a_class_hold_the_answer(dnd: DnD) -> None:
    free = dnd.complete("hello", max_new_tokens=ROOM)
    held = [dnd.complete("hello", schema=s, max_new_tokens=ROOM) for s in (PAIR, json.dumps(PAIR))]
    assert held[0] == held[1] != free and fits_pair(held[0].text)
    parcel = dnd.complete("hello", schema=Parcel, max_new_tokens=ROOM)
    assert {held[0].finish_reason, parcel.finish_reason} == {"stop"}
    assert Parcel.model_validate_json(parcel.text) and json.loads(parcel.text).keys() == Parcel.model_fields.keys()


def test_adapters_and_rows_of_a_batch_are_held_each_as_alone(dnd: DnD) -> None:
    made = dnd.adapt(prompts_of("upper"), name="upper").adapter
    how = {"schema": Parcel, "max_new_tokens": ROOM}
    prompts, adapters = ["hello", "hello", "what is it?"], [None, made, made]
    together = dnd.complete_batch(prompts, adapters, **how)
    assert together == [dnd.complete(p, a, **how) for p, a in zip(prompts, adapters, strict=True)]
    assert all(Parcel.model_validate_json(c.text) for c in together) and together[0].adapter is None


def test_of_rows_that_run_together_only_those_that_ask_are_held(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dnd.adapt(prompts_of("upper"), name="upper").adapter
    asked: list[dict[str, Any]] = [
        {"prompt": "hello", "max_new_tokens": 30},
        {"prompt": "hello", "schema": PAIR, "max_new_tokens": ROOM},
        {"prompt": "hello", "adapter": made, "max_new_tokens": 40},
        {"prompt": "why", "schema": Parcel, "adapter": made, "max_new_tokens": ROOM},
        {"prompt": "hello", "temperature": 1.0, "seed": 3, "max_new_tokens": 20},
    ]
    alone = [dnd.complete(**how) for how in asked]
    seen = steps(monkeypatch)
    with dnd.engine.turns.take():  # so that all of them are there when the first step is made
        streams: list[CompletionStream] = [dnd.stream(**how) for how in asked]
    assert [s.result for s in streams] == alone
    assert max(seen) == len(asked) and fits_pair(alone[1].text) and Parcel.model_validate_json(alone[3].text)


def test_a_stream_is_held_too(dnd: DnD) -> None:
    stream = dnd.stream("hello", schema=Parcel, max_new_tokens=ROOM)
    pieces = list(stream)
    assert len(pieces) > 3 and Parcel.model_validate_json("".join(pieces))
    assert stream.result == dnd.complete("hello", schema=Parcel, max_new_tokens=ROOM)


def test_seeds_repeat_and_rows_draw_apart_within_the_schema(dnd: DnD) -> None:
    how = {"schema": Parcel, "max_new_tokens": ROOM, "temperature": 2.0}
    drawn = dnd.complete_batch(["hello"] * 4, seed=5, **how)
    assert drawn == [dnd.complete("hello", seed=seed, **how) for seed in (5, 6, 7, 8)]
    assert len({c.text for c in drawn}) == 4 and all(Parcel.model_validate_json(c.text) for c in drawn)


def test_too_few_tokens_end_in_the_middle(dnd: DnD) -> None:
    whole, cut = (dnd.complete("hello", schema=Parcel, max_new_tokens=n) for n in (ROOM, 9))
    assert (cut.finish_reason, cut.usage["completion_tokens"]) == ("length", 9)
    assert whole.text.startswith(cut.text) and len(cut.text) == 9
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.text)


class Opaque(BaseModel):
    """No schema says what this is."""

    call: Callable[[], int]


class Broken(BaseModel):
    """Describes itself with what no schema has."""

    model_config = {"json_schema_extra": {"type": "strange"}}

    @field_serializer("*")
    def _any(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (3, "schema must be a JSON schema"),
        ([PAIR], "schema must be a JSON schema"),
        ("{no json", "text that is no JSON"),
        (Opaque, "cannot be described"),
        (Broken, "at /type: Invalid type: strange"),
        ({"type": "string", "format": "weird"}, "at /format: Unknown format"),
        ({"enum": []}, "Unsatisfiable"),
        ({"x": "a" * 70_000}, "larger than"),
    ],
)
def test_a_bad_schema_is_refused_before_anything_runs(
    dnd: DnD, schema: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = steps(monkeypatch)
    calls = (
        lambda: dnd.complete("hello", schema=schema),
        lambda: dnd.complete_batch(["hello", "there"], schema=schema),
        lambda: dnd.stream("hello", schema=schema),
    )
    for call in calls:
        with pytest.raises(ConfigError, match=said):
            call()
    assert not seen


def test_a_schema_holds_with_tools_on_offer_too(dnd: DnD) -> None:
    dnd.base.tokenizer.chat_template = HERMES_TEMPLATE
    shown = dnd.complete("hello", schema=PAIR, tools=[ADD], max_new_tokens=ROOM)
    assert fits_pair(shown.text) and shown.usage["prompt_tokens"] > len(json.dumps(ADD))
    with dnd.stream("hello", schema=PAIR, tools=[ADD], max_new_tokens=ROOM) as stream:
        assert stream.result == shown
    assert fits_pair(dnd.complete("hello", schema=PAIR, tools=[], max_new_tokens=ROOM).text)
    assert dnd.complete("hello", schema=None, max_new_tokens=4) == dnd.complete("hello", max_new_tokens=4)


def test_a_schema_of_calls_makes_the_answer_a_call(dnd: DnD) -> None:
    dnd.base.tokenizer.chat_template = HERMES_TEMPLATE
    bounded = {"type": "object", "properties": {"place": {"$ref": "#/$defs/place"}}, "required": ["place"]}
    place = {"type": "object", "properties": {"floor": {"enum": [1, 2]}}, "required": ["floor"]}
    go = {"type": "function", "function": {"name": "go", "parameters": {**bounded, "$defs": {"place": place}}}}
    answer = dnd.complete("hello", schema=call_schema([go]), tools=[go], max_new_tokens=ROOM)
    [call] = read_answer(answer.text, [go]).calls
    assert call.name == "go" and call.arguments["place"].keys() == {"floor"}
    assert call.arguments["place"]["floor"] in (1, 2)


def written(dnd: DnD, plain: PreTrainedModel, prompt: str, n: int, **how: Any) -> tuple[int, torch.Tensor]:
    """(Tokens of the prompt, ids `(1, T)` of the prompt and transformers' greedy answer)."""
    ids = chat_ids(dnd.base, prompt)
    out = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, **how)
    return ids.shape[1], out


def shown(dnd: DnD, ids: list[int]) -> str:
    tokenizer = dnd.base.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
    return read_bytes(tokens, final=ids[-1] == tokenizer.eos_token_id)


def test_logprobs_are_those_of_a_plain_forward(dnd: DnD, plain: PreTrainedModel) -> None:
    start, ids = written(dnd, plain, "hello", 12)
    with torch.no_grad():
        logprobs = plain(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)  # (n_new, V)
    want = logprobs.gather(1, ids[0, start:, None])[:, 0]
    told = dnd.complete("hello", max_new_tokens=12, logprobs=4)
    assert told.logprobs is not None and len(told.logprobs) == told.usage["completion_tokens"] == len(want)
    torch.testing.assert_close(torch.tensor([t.logprob for t in told.logprobs]), want, rtol=1e-4, atol=1e-4)
    assert sum(t.logprob for t in told.logprobs) == pytest.approx(want.sum().item(), abs=1e-3)
    assert [t.text for t in told.logprobs] == [dnd.base.tokenizer.decode([t]) for t in ids[0, start:].tolist()]
    best = logprobs.topk(4)
    got = torch.tensor([[p for _, p in t.likeliest] for t in told.logprobs])
    torch.testing.assert_close(got, best.values, rtol=1e-4, atol=1e-4)
    texts = [[dnd.base.tokenizer.decode([t]) for t in row] for row in best.indices.tolist()]
    assert [[text for text, _ in t.likeliest] for t in told.logprobs] == texts


def test_logprobs_change_no_answer_and_are_the_models_own(dnd: DnD) -> None:
    how = {"max_new_tokens": 10, "temperature": 1.5, "seed": 4}
    bare, told = dnd.complete("hello", **how), dnd.complete("hello", logprobs=2, **how)
    assert (bare.text, bare.logprobs) == (told.text, None) and told.logprobs is not None
    assert [len(t.likeliest) for t in told.logprobs] == [2] * told.usage["completion_tokens"]
    assert all(t.logprob <= t.likeliest[0][1] and t.likeliest[0][1] >= t.likeliest[1][1] for t in told.logprobs)
    assert [t.likeliest for t in dnd.complete("hello", max_new_tokens=3, logprobs=0).logprobs or ()] == [()] * 3
    streamed = dnd.stream("hello", logprobs=2, **how)
    assert streamed.result == told
    # before the mask: what the schema forces may be anything but likely
    held = dnd.complete("hello", schema=PAIR, max_new_tokens=ROOM, logprobs=1).logprobs
    free = dnd.complete("hello", max_new_tokens=1, logprobs=1).logprobs
    assert held is not None and free is not None
    assert held[0].text == "{" and held[0].likeliest == free[0].likeliest and held[0].logprob < free[0].logprob


@pytest.mark.parametrize("penalty", [0.6, 1.3, 2.5])
def test_a_repetition_penalty_is_that_of_transformers(dnd: DnD, plain: PreTrainedModel, penalty: float) -> None:
    for prompt in ("hello", "what is the capital of France?"):
        start, ids = written(dnd, plain, prompt, 16, repetition_penalty=penalty)
        got = dnd.complete(prompt, max_new_tokens=16, repetition_penalty=penalty)
        assert got.text == shown(dnd, ids[0, start:].tolist()) != dnd.complete(prompt, max_new_tokens=16).text


def test_min_p_leaves_out_what_is_less_likely(dnd: DnD) -> None:
    how = {"max_new_tokens": 30, "temperature": 1.0, "logprobs": 1}

    def least(**more: Any) -> float:
        """The smallest share of the likeliest token's probability that was drawn."""
        drawn = dnd.complete_batch(["hello"] * 3, seed=1, **how, **more)
        return min(math.exp(t.logprob - t.likeliest[0][1]) for c in drawn for t in c.logprobs or ())

    assert least() < 0.6 and least(min_p=0.8) >= 0.8 - 1e-6
    greedy = dnd.complete("hello", max_new_tokens=30)
    assert dnd.complete("hello", min_p=1.0, seed=2, **how).text == greedy.text
    assert dnd.complete("hello", max_new_tokens=30, min_p=0.8) == greedy


@pytest.mark.parametrize(
    "bad", [{"min_p": 1.5}, {"repetition_penalty": 0.0}, {"logprobs": 21}, {"logprobs": True}, {"min_p": "x"}]
)
def test_options_out_of_range_are_named(dnd: DnD, bad: dict[str, Any]) -> None:
    with pytest.raises(DndError, match=next(iter(bad))):
        dnd.complete("hello", **bad)
