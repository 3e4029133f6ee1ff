"""Completion held to a JSON schema: masks against trying every token, random walks, refusals, bounds."""

from __future__ import annotations

import json
import random
import sys
import threading
from typing import Any

import pytest
import torch
from helpers import read_bytes, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from schema_walks import CODE, NODE, PERSON, SCHEMAS, allowed, fits, walk
from transformers import PreTrainedTokenizerFast

from dnd_sdk.config import Home
from dnd_sdk.engine.constraint import Constraint, Constraints
from dnd_sdk.errors import ConfigError, MissingExtraError

TOKENIZER, V, END = tiny_tokenizer(), 300, 2  # 40 logits more than tokens
TINY = Constraints(TOKENIZER, V, {END})


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def text(tokens: list[int]) -> str:
    return read_bytes(TOKENIZER.convert_ids_to_tokens(tokens), final=True)


def after(schema: Any, said: str) -> Constraint:
    constraint = TINY.start(schema)
    for token in ids(said):
        constraint.accept(token)
    return constraint


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEMAS)), st.integers(0, 2**32))
def test_whatever_is_drawn_from_the_masks_fits_the_schema(name: str, seed: int) -> None:
    schema: Any = SCHEMAS[name]
    tokens = walk(TINY.start(schema), V, END, seed)
    if tokens is not None:
        assert fits(json.loads(text(tokens)), schema, schema), text(tokens)


def test_most_walks_come_to_an_end() -> None:
    ended = [walk(TINY.start(s), V, END, seed) is not None for s in SCHEMAS.values() for seed in range(5)]
    assert sum(ended) >= 0.8 * len(ended)


def test_the_validator_of_these_tests_can_say_no() -> None:
    assert fits({"name": "x", "age": 3}, PERSON, PERSON)
    for wrong in ({"name": "x"}, {"name": "x", "age": "3"}, {"name": "x", "age": 3, "b": 1}, [], {"name": 1, "age": 3}):
        assert not fits(wrong, PERSON, PERSON)
    assert not fits("ab-1", CODE, CODE) and not fits({"value": "c", "next": None}, NODE, NODE)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_mask_is_what_trying_every_token_gives(name: str) -> None:
    rng, said = random.Random(1), []
    constraint = TINY.start(SCHEMAS[name])
    for _ in range(12):
        tried = []
        for token in range(V):
            fresh = TINY.start(SCHEMAS[name])
            try:
                for t in [*said, token]:
                    fresh.accept(t)
                tried.append(token)
            except ConfigError:
                pass
        assert allowed(constraint, V) == tried
        if constraint.over:
            break
        said.append(rng.choice([t for t in tried if t != END]))
        constraint.accept(said[-1])


@pytest.mark.parametrize(
    ("said", "ends", "over"),
    [
        ("", False, False),
        ('{"name": "x"', False, False),
        ('{"name":"x","age":3', False, False),
        ('{"name":"x", "age": 3}', True, True),
    ],
)
def test_the_end_is_allowed_exactly_where_the_text_is_complete(said: str, ends: bool, over: bool) -> None:
    constraint = after(PERSON, said)
    assert (END in allowed(constraint, V), constraint.over) == (ends, over)


def test_a_number_may_end_or_go_on() -> None:
    constraint = after({"type": "integer"}, "12")
    assert END in allowed(constraint, V) and len(allowed(constraint, V)) == 11 and not constraint.over
    constraint.accept(END)
    assert constraint.over and allowed(constraint, V) == [END]
    constraint.accept(END)


def test_every_end_token_ends_and_nothing_else_special_is_ever_allowed() -> None:
    both = Constraints(TOKENIZER, V, frozenset({END, 1})).start({"const": 7})
    assert allowed(both, V) == ids("7")
    both.accept(ids("7")[0])
    assert allowed(both, V) == [1, END]
    inside = allowed(after({"type": "string"}, '"a'), V)
    assert not {0, 1, 2, 3} & set(inside) and max(inside) < len(TOKENIZER)


def test_at_most_one_space_after_a_comma_or_a_colon_and_none_elsewhere() -> None:
    space = ids(" ")[0]
    places = {"": False, "{": False}
    places |= {'{"name":': True, '{"name": ': False, '{"name": "x",': True, '{"name": "x", ': False}
    assert {said: space in allowed(after(PERSON, said), V) for said in places} == places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_allowed_keeps_its_logit(dtype: torch.dtype) -> None:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = logits.clone()
    after(PERSON, "").mask(logits)
    kept = logits.isfinite()
    assert kept.sum() == 1 and torch.equal(logits[kept], before[kept]) and bool((logits[~kept] == -torch.inf).all())


def test_a_token_that_is_not_allowed_is_refused() -> None:
    constraint = after(PERSON, '{"name": ')
    with pytest.raises(ConfigError, match="cannot be held to its schema"):
        constraint.accept(ids("7")[0])
    with pytest.raises(ConfigError, match="cannot be held to its schema"):
        constraint.mask(torch.zeros(V))
    assert not constraint.over


def test_rows_of_one_schema_are_apart_and_it_is_compiled_once() -> None:
    one, other = after(PERSON, '{"name": "x'), TINY.start(json.dumps(PERSON))
    assert text(allowed(other, V)) == "{" and len(allowed(one, V)) > 50
    before = TINY._compiled.cache_info()
    TINY.start(PERSON)
    assert TINY._compiled.cache_info().misses == before.misses


def test_threads_that_come_together_load_the_tables_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, made = Constraints(TOKENIZER, V, {END}), []
    read = shared._read_vocabulary
    monkeypatch.setattr(shared, "_read_vocabulary", lambda: made.append(1) or read())
    walks: list[Any] = []
    threads = [threading.Thread(target=lambda s=s: walks.append(walk(shared.start(CODE), V, END, s))) for s in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(walks) == 8 and all(fits(json.loads(text(w)), CODE, CODE) for w in walks)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strin"}, "at /type: Invalid type: strin"),
        ({"properties": {"a": {"not": {}}}}, r'at /properties/a/not: Unimplemented keys: \["not"\]'),
        ({"type": "string", "format": "weird"}, "at /format: Unknown format"),
        ({"type": "string", "pattern": "^(?=a)"}, "regex parse error"),
        ({"$ref": "http://example.com/x.json"}, "example.com"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "#"}, "cannot be enforced"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": -(10**40)}, "cannot be enforced"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(schema: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TINY.start(schema)


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_schemas_at_the_limit_work_and_beyond_are_refused() -> None:
    assert allowed(TINY.start(nested(60)), V) == ids("[")
    for deep in (nested(70), nested(5_000), json.dumps(nested(200)), "[" * 60_000):
        with pytest.raises(ConfigError, match="nested deeper"):
            TINY.start(deep)
    with pytest.raises(ConfigError, match="larger than"):
        TINY.start({"enum": [f"word {i}" for i in range(10_000)]})


def test_a_schema_of_endless_text_is_held_to_all_the_same() -> None:
    endless = {"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object", "additionalProperties": False}
    assert text(allowed(after(endless, '{"a":{"a": {"a":{'), V)) == '"'
    for huge in ({"type": "string", "maxLength": 10**9}, {"type": "array", "minItems": 10**6}):
        assert TINY.start(huge)


def test_a_pattern_that_takes_too_much_work_ends_the_row() -> None:
    constraint = TINY.start({"type": "string", "pattern": "^(a{1000}){1000}$"})
    with pytest.raises(ConfigError, match="cannot be held to its schema any further"):
        for token in ids('"aaa'):
            constraint.mask(torch.zeros(V))
            constraint.accept(token)


def test_a_tokenizer_that_the_library_does_not_take_is_refused() -> None:
    from tokenizers import Tokenizer, models

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[U]": 1}, unk_token="[U]")))
    for tokenizer, size, ends in ((words, 2, {0}), (object(), 2, {0}), (TOKENIZER, 100, {END}), (TOKENIZER, V, ())):
        with pytest.raises(ConfigError, match="cannot be held to a schema"):
            Constraints(tokenizer, size, ends).start(PERSON)


def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Constraints(TOKENIZER, V, {END})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match="llguidance\n  fix: pip install llguidance"):
        made.start(PERSON)


@pytest.mark.real
@pytest.mark.parametrize("name", SCHEMAS)
def test_walks_over_a_real_vocabulary_fit(name: str, real_home: Home) -> None:
    from transformers import AutoTokenizer

    from dnd_sdk.models import pull

    tokenizer = AutoTokenizer.from_pretrained(pull("smollm2-135m", real_home))
    size, end = len(tokenizer) + 7, tokenizer.eos_token_id
    constraints, ended = Constraints(tokenizer, size, {end}), 0
    for seed in range(8):
        tokens = walk(constraints.start(SCHEMAS[name]), size, end, seed, most=120)
        if tokens is not None:
            ended += 1
            assert fits(json.loads(tokenizer.decode(tokens)), SCHEMAS[name], SCHEMAS[name])
    assert ended
