"""Option log-likelihoods against the naive way: every full sequence by itself through plain peft."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from engine_parts import PROMPTS, SUMS, naive_logprob, peft_model, strong, tiny_base, tiny_engine, tiny_layout
from helpers import FAMILIES

from dnd_sdk.engine import Engine, option_logprobs, scoring
from dnd_sdk.errors import ConfigError, InputError

OPTIONS = [["yes", "no", "perhaps so"], ["a"], ["billing", "", "é", "refund please", "no"], ["x", "yy"], ["one", "two"]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [None, 16])
def test_equals_scoring_each_sequence_alone(family: str, window: int | None) -> None:
    base = tiny_base(family)
    if window is not None:
        if not hasattr(base.model.config, "sliding_window") or family == "qwen2":
            pytest.skip("no sliding window")
        _set_window(base.model, window)
    layout = tiny_layout(base)
    flats = {name: strong(layout, i) for i, name in enumerate("ab")}
    models = {name: peft_model(base, layout, flat) for name, flat in flats.items()} | {None: copy.deepcopy(base.model)}
    engine = Engine(base, layout)
    for name, flat in flats.items():
        engine.bank.load(name, flat)
    adapters = ["a", None, "b", "a", None]
    asked = zip(PROMPTS, OPTIONS, adapters, strict=True)
    want = [[naive_logprob(models[a], base, p, o) for o in os] for p, os, a in asked]
    for batch_tokens in (1, 90, 2048):
        got = option_logprobs(engine, PROMPTS, OPTIONS, adapters, batch_tokens=batch_tokens)
        for have, expect in zip(got.logprobs, want, strict=True):
            torch.testing.assert_close(torch.tensor(have), torch.tensor(expect), **SUMS)
        assert got.n_tokens == [[len(o.encode()) + 1 for o in os] for os in OPTIONS]


def _set_window(model: Any, window: int) -> None:
    model.config.sliding_window = window
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = window


def test_many_options_are_split_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    options = [f"option {i}" for i in range(12)]
    whole = option_logprobs(engine, ["hi"], [options], [None])
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * 260 * 20)
    rows = _count_rows(engine, monkeypatch)
    split = option_logprobs(engine, ["hi"], [options], [None])
    assert len(rows) == 6  # two options of at most 9 read tokens fit in 19
    torch.testing.assert_close(torch.tensor(split.logprobs), torch.tensor(whole.logprobs), **SUMS)
    assert split.n_tokens == whole.n_tokens


def test_more_adapters_than_slots() -> None:
    base = tiny_base()
    layout = tiny_layout(base)
    engine = Engine(base, layout, n_slots=1, fetch=lambda name: strong(layout, "ab".index(name)))
    both = engine.option_logprobs(["hi", "hi", "hi"], ["a", "b", "a"], ["yes", "no"])
    assert both.shape == (3, 2) and torch.equal(both[0], both[2]) and not torch.allclose(both[0], both[1])


def _count_rows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the width of every row the model reads."""
    seen: list[int] = []
    forward = engine.base.model.forward

    @functools.wraps(forward)
    def counted(**inputs: Any) -> Any:
        rows, width = inputs["input_ids"].shape
        seen.extend([width] * rows)
        return forward(**inputs)

    monkeypatch.setattr(engine.base.model, "forward", counted)
    return seen


def test_options_share_one_reading_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    engine.bank.load("a", strong(engine.layout, 0))
    rows = _count_rows(engine, monkeypatch)
    n = len(engine.prompt_ids("hi", 1))
    option_logprobs(engine, ["hi", "hi"], [["aa", "bbb"]] * 2, [None, "a"])  # two adapters share nothing else
    assert rows == [n + 5, n + 5]


def test_bad_calls() -> None:
    engine = tiny_engine()
    with pytest.raises(InputError, match="1 chats, 2 option lists"):
        option_logprobs(engine, ["hi"], [["a"], ["b"]], [None])
    with pytest.raises(InputError, match="chat 0 has no options"):
        option_logprobs(engine, ["hi"], [[]], [None])
    with pytest.raises(InputError, match="at most"):
        option_logprobs(engine, ["hi"], [["a" * 600]], [None])
    engine.base.model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match="flex_attention"):
        option_logprobs(engine, ["hi"], [["a"]], [None])
