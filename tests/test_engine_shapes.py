"""Rows of many lengths and bases of many kinds: each answer is that of the request alone, and of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_parts import PROMPTS, ask, ask_all, chat_ids, strong, tiny_base, tiny_layout
from helpers import FAMILIES, GROUPED, TINY_SIZES, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine
from dnd_sdk.engine.row import Row
from dnd_sdk.errors import InputError
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.models.loading import Base

MIX = ["x" * 180, "y" * 225, "hi", "z" * 215, "w" * 100, "hi", "y" * 225, "y" * 10, "q" * 400, "v" * 238]
ADAPTERS: list[str | None] = ["a", "b", None, "c", "a", "b", None, "a", "b", "b"]
OPTIONS = SamplingOptions(max_new_tokens=60)


def fetching(**settings: Any) -> Engine:
    base = settings.pop("base", None) or tiny_base()
    layout = settings.pop("layout", None) or tiny_layout(base)
    return Engine(base, layout, n_slots=4, fetch=lambda name: strong(layout, "abcdefghijkl".index(name)), **settings)


@pytest.mark.parametrize("max_batch", [1, 3, 16])
@pytest.mark.parametrize("fixed", [False, True])
def test_rows_outgrow_their_lanes_at_any_time(max_batch: int, fixed: bool) -> None:
    engine, alone = fetching(max_batch=max_batch), fetching(max_batch=1)
    if fixed:
        engine._scheduler._forward.fix_shapes(capture=False)
    single = [ask(alone, p, a, OPTIONS) for p, a in zip(MIX, ADAPTERS, strict=True)]
    assert max(g.prompt_tokens for g in single) + 60 > 256 > min(g.prompt_tokens for g in single)
    assert len({g.text for g in single}) > 8
    for _ in range(2):
        assert ask_all(engine, MIX, ADAPTERS, OPTIONS) == single


def test_fixed_steps_are_made_once_for_all_mixes_and_swaps() -> None:
    engine, alone = fetching(max_batch=4), fetching(max_batch=1)
    engine._scheduler._forward.fix_shapes(capture=False, n_rows=4)
    prompts, counts = PROMPTS[:4], []
    for i in range(0, 24, 2):
        adapters = ["abcdefghijkl"[(i * k) % 12 if i < 12 else (i + 1) % 12] for k in range(1, 5)]
        want = [ask(alone, p, a, OPTIONS).text for p, a in zip(prompts, adapters, strict=True)]
        assert [g.text for g in ask_all(engine, prompts, adapters, OPTIONS)] == want
        counts.append(engine._scheduler._forward.fixed.n_graphs)
    assert len(set(counts)) == 1


def test_sizes_at_their_limits() -> None:
    engine = fetching()
    empty = len(engine.prompt_ids("", 1))
    limit = engine.context_tokens
    assert engine.complete([]) == []
    for prompt, new in (("x" * (limit - empty - 1), 1), ("x" * (limit - empty - 9), 9), ("", limit - empty)):
        got = ask(engine, prompt, "a", SamplingOptions(max_new_tokens=new))
        assert got.prompt_tokens + new == limit and got.completion_tokens <= new
        with pytest.raises(InputError):
            ask(engine, prompt + "x", "a", SamplingOptions(max_new_tokens=new))
    engine.base.tokenizer.chat_template = None
    one = SamplingOptions(max_new_tokens=1)
    assert ask(engine, "x", "a", one).prompt_tokens == 1
    assert ask_all(engine, ["x", "x", "xx"], ["a", "a", "b"], OPTIONS)[0] == ask(engine, "x", "a", OPTIONS)


def test_prompts_that_are_the_same_or_within_each_other() -> None:
    engine, alone = fetching(), fetching()
    alone.base.tokenizer.chat_template = engine.base.tokenizer.chat_template = None
    text = "a long head that all of them have, and more of it"
    prompts = [text, text, text[:40], text[:17], text[:16], text[:15], text + "!", text]
    for adapter in (None, "a"):
        single = [fetching(base=alone.base, layout=alone.layout) for _ in prompts]
        want = [ask(e, p, adapter, OPTIONS) for e, p in zip(single, prompts, strict=True)]
        for _ in range(2):
            assert ask_all(engine, prompts, [adapter] * 8, OPTIONS) == want


# --- bases ---


def odd_base(family: str, *, attention: str = "sdpa", **changes: Any) -> Base:
    """A tiny base with another configuration."""
    config = AutoConfig.for_model(family, **{**TINY_SIZES, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)
    return Base(model, tiny_tokenizer(), family, "0" * 64)


ODD: dict[str, tuple[dict[str, Any], str | None]] = {
    "gemma3_text": ({**GROUPED, "sliding_window": 16}, None),
    "mistral": ({**GROUPED, "sliding_window": 16}, None),
    "llama": ({**GROUPED, "attention": "eager"}, "eager"),
    "gpt_neox": ({}, None),
    "lfm2": ({"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "conv"),
    "mamba": ({"state_size": 4, "time_step_rank": 4, "attention": "eager"}, "linear_attention"),
}
TARGETS = {"gpt_neox": ["query_key_value", "dense"], "lfm2": ["q_proj", "in_proj"], "mamba": ["in_proj", "x_proj"]}
LONG = ["hi " * 8, "what is the capital of France? " * 4, "route this ticket " * 9, "x"]


def greedy_tokens(model: Any, base: Base, text: str, n: int) -> list[int]:
    ids = chat_ids(base, text)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@contextmanager
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """The tokens of each request by its chat and adapter."""
    tokens: dict[Any, list[int]] = {}
    finish = Row.finish

    def noted(self: Row) -> None:
        tokens[self.request.chat, self.request.adapter_id] = list(self._tokens)
        finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(Row, "finish", noted)
        yield tokens


@pytest.mark.parametrize("family", [*ODD, *[f"plain {f}" for f in FAMILIES]])
def test_bases_answer_as_transformers_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, slow = ODD.get(family, ({}, None))
    base = tiny_base(family.removeprefix("plain ")) if family.startswith("plain") else odd_base(family, **changes)
    modules = {"target_modules": TARGETS[family]} if family in TARGETS else {}
    want = {(p, None): greedy_tokens(base.model, base, p, 24) for p in LONG}
    layout = LoraLayout.from_model(base.model, r=4, lora_alpha=12, **modules)
    engine = Engine(base, layout, n_slots=2)
    engine._scheduler._piece = engine._scheduler._large_piece = 13  # not the window's multiple
    engine.bank.load("a", strong(layout, 0) * 0.3)
    assert (engine.slow_because is None) if slow is None else slow in (engine.slow_because or "")
    options = SamplingOptions(max_new_tokens=24)
    with told(monkeypatch) as tokens:
        alone = [ask(engine, p, "a", options) for p in LONG]
        together = ask_all(engine, LONG * 2, [None] * 4 + ["a"] * 4, options)
    assert {key: tokens[key] for key in want} == want
    assert together[4:] == alone


# --- deterministic ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_batch", [4, 6])
def test_deterministic_logits_do_not_depend_on_the_others(
    dtype: torch.dtype, max_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base()
    base.model.to(dtype)
    engine = fetching(base=base, max_batch=max_batch, deterministic=True)
    seen: dict[Row, list[torch.Tensor]] = {}
    take = engine._scheduler._take_tokens

    def noted(rows: Any, logits: torch.Tensor) -> None:
        for row, own in zip(rows, logits, strict=True):
            seen.setdefault(row, []).append(own.clone())
        take(rows, logits)

    monkeypatch.setattr(engine._scheduler, "_take_tokens", noted)

    def logits(requests: list[CompletionRequest]) -> list[torch.Tensor]:
        seen.clear()
        engine.complete(requests)
        by_request = {id(row.request): torch.stack(steps) for row, steps in seen.items()}
        return [by_request[id(r)] for r in requests]

    lengths = [3, 60, 20, 33, 60, 7, 41, 5, 60, 60]
    requests = [
        CompletionRequest(p, a, SamplingOptions(max_new_tokens=n))
        for p, a, n in zip(MIX, ADAPTERS, lengths, strict=True)
    ]
    alone = [logits([r])[0] for r in requests]
    for some in (requests, requests[::-1], requests[3:8], requests[::3]):
        for request, got in zip(some, logits(some), strict=True):
            assert torch.equal(got, alone[next(i for i, r in enumerate(requests) if r is request)])
