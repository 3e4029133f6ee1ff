"""What a list of prompts begins with is read once, and nobody can tell but by the clock."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_parts import (
    SUMS,
    ask,
    ask_all,
    greedy,
    naive_logprob,
    peft_model,
    strong,
    tiny_base,
    tiny_engine,
    tiny_layout,
)
from helpers import FAMILIES

from dnd_sdk import DnD
from dnd_sdk.config import Home, SamplingOptions
from dnd_sdk.engine import Engine
from dnd_sdk.engine.prefix import MIN_SHARED, shared_prefix
from dnd_sdk.engine.scoring import option_logprobs
from dnd_sdk.models import SMALL_BASE

TICKETS = Path(__file__).parents[1] / "examples" / "support_tickets"
SHORT = SamplingOptions(max_new_tokens=8)
HEAD = "Answer with the name of one queue, billing or login. "
ASKED = [HEAD + text for text in ("My card was charged twice.", "I cannot log in", "x", "Where is my invoice of May?")]
OPTIONS = ["billing", "login", "no"]


def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A list that grows by the shape of all ids the model's layers read at once."""
    seen: list[tuple[int, ...]] = []
    forward = engine.base.model.base_model.forward

    @functools.wraps(forward)
    def noted(*args: Any, **inputs: Any) -> Any:
        seen.append(tuple(inputs["input_ids"].shape))
        return forward(*args, **inputs)

    monkeypatch.setattr(engine.base.model.base_model, "forward", noted)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("max_batch", [2, 16])
def test_answers_and_scores_are_those_of_each_prompt_alone(family: str, adapter: str | None, max_batch: int) -> None:
    base = tiny_base(family)
    layout = tiny_layout(base)
    flat = strong(layout, 0)
    alone = peft_model(base, layout, flat if adapter else torch.zeros_like(flat))
    engine = Engine(base, layout, max_batch=max_batch)
    engine.bank.load("a", flat)
    ids = [adapter] * len(ASKED)
    said = [g.text for g in ask_all(engine, ASKED, ids, SHORT)]
    assert said == [greedy(alone, base, p, 8) for p in ASKED]
    want = torch.tensor([[naive_logprob(alone, base, p, o) for o in OPTIONS] for p in ASKED])
    assert want.std(0).min() > 2e-3  # the prompts matter, by several times the tolerance
    for batch_tokens in (1, 2048):
        got = option_logprobs(engine, ASKED, [OPTIONS] * len(ASKED), ids, batch_tokens=batch_tokens)
        torch.testing.assert_close(torch.tensor(got.logprobs), want, **SUMS)


def test_the_shared_part_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(max_batch=2)
    lengths = [len(engine.prompt_ids(p, 8)) for p in ASKED]
    n = 1 + len("user\n" + HEAD)  # the start token, then a token a letter; after it they differ at once
    seen = watched(engine, monkeypatch)
    ask_all(engine, ASKED, [None] * 4, SamplingOptions(max_new_tokens=1))
    assert sum(tokens for _, tokens in seen) == lengths[0] + sum(lengths[1:]) - 3 * n
    seen.clear()
    option_logprobs(engine, ASKED, [["a", "b"]] * 4, [None] * 4)
    assert seen == [(1, n), (4, max(lengths) - n + 2)]


def test_cases_without_anything_to_share() -> None:
    engine = tiny_engine()
    model, long = engine.base.model, list(range(MIN_SHARED))
    assert shared_prefix(model, [[*long, 1], [*long, 2]], ["a", "a"]) is not None
    assert shared_prefix(model, [[*long, 1]], ["a"]) is None
    assert shared_prefix(model, [[*long, 1], [*long, 2]], ["a", None]) is None
    assert shared_prefix(model, [[*long[1:], 1], [*long[1:], 2]], ["a", "a"]) is None
    same = shared_prefix(model, [[*long, 1]] * 3, [None] * 3)  # the same prompt three times: each keeps a token
    assert same is not None and len(same) == MIN_SHARED
    assert shared_prefix(model, [long] * 3, [None] * 3) is None
    model.config.sliding_window = 8
    assert shared_prefix(model, [[*long, 1], [*long, 2]], ["a", "a"]) is None
    model.config.sliding_window = None
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert shared_prefix(model, [[*long, 1], [*long, 2]], ["a", "a"]) is None


def test_one_batch_does_not_write_into_what_the_next_one_reads() -> None:
    engine = tiny_engine()
    ids = engine.prompt_ids(ASKED[0], 8)
    with engine.running([None]):
        prefix = shared_prefix(engine.base.model, [ids, ids], [None, None])
        assert prefix is not None
        first = prefix.cache(2)
        engine.base.model(input_ids=torch.tensor([ids[-1:]] * 2), past_key_values=first)
        assert first.get_seq_length() == len(ids) and prefix.cache(3).get_seq_length() == len(ids) - 1


@pytest.mark.real
def test_the_small_base_answers_a_list_as_it_answers_each_prompt(real_home: Home) -> None:
    dnd = DnD.load(SMALL_BASE, home=real_home)
    prompts = [row["prompt"] for row in map(json.loads, (TICKETS / "prompts.jsonl").read_text().splitlines())][:6]
    dnd.engine.bank.load("mean", dnd.generator.mean())
    for adapter in (None, "mean"):
        said = [g.text for g in ask_all(dnd.engine, prompts, [adapter] * len(prompts), SHORT)]
        assert said == [ask(dnd.engine, p, adapter, SHORT).text for p in prompts] and len(set(said)) > 1
        scores = dnd.engine.option_logprobs(prompts, [adapter] * len(prompts), ["billing", "login"])
        alone = [dnd.engine.option_logprobs([p], [adapter], ["billing", "login"]) for p in prompts]
        torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-4, atol=1e-3)
