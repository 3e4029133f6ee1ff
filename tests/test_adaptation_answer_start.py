"""What is watched where answers begin equals what plain forwards compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import random_flat, tiny_model, tiny_tokenizer
from torch import Tensor

from dnd_sdk.adaptation.answer_start import ELSEWHERE, AnswerStart
from dnd_sdk.chat.template import prompt_ids
from dnd_sdk.engine import Resident
from dnd_sdk.engine.prefix import MIN_SHARED
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.lora.linear import tables_from_flat, use_lora
from dnd_sdk.models.loading import Base

APART = ["ab", "c", "some longer words " * 3, "d e"]
ALIKE = [f"Pick one of the {MIN_SHARED} words below: {p}" for p in APART]


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(tiny_model(), tiny_tokenizer(), "tiny", "f" * 64)


@pytest.mark.parametrize("prompts", [APART, ALIKE])
@torch.no_grad()
def test_reading_is_as_one_plain_forward_a_prompt(base: Base, prompts: list[str]) -> None:
    layout = LoraLayout.from_model(base.model, r=4)
    flat, start, model = random_flat(layout), AnswerStart(Resident(base, layout)), base.model
    rows = [prompt_ids(base.tokenizer, p) for p in prompts]
    seen = start.reader(flat, rows)(rows)
    assert seen.straight and seen.hidden.shape[0] == seen.x.shape[0] == len(rows)
    inner: list[Any] = []
    down: Any = model.get_submodule(start.module or "")
    hook = down.register_forward_pre_hook(lambda _, args: inner.append(args[0][0]))
    for i, ids in enumerate(rows):
        with use_lora(tables_from_flat(layout, flat[None]), 0):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(start.logits(seen.hidden[i, None])[0], logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen.x[i], inner[-1][-1], atol=1e-5, rtol=1e-4)
        kept = seen.elsewhere[i * ELSEWHERE : (i + 1) * ELSEWHERE] if len(seen.elsewhere) == 4 * ELSEWHERE else []
        for one in kept:  # some position before the last
            assert (inner[-1][:-1] - one).abs().amax(1).min() < 1e-4
    hook.remove()


@torch.no_grad()
def test_a_change_of_the_factors_moves_the_stream_as_it_says(base: Base) -> None:
    layout = LoraLayout.from_model(base.model, r=4)
    start, rows = AnswerStart(Resident(base, layout)), [prompt_ids(base.tokenizer, p) for p in APART]
    before = random_flat(layout)
    seen, after = start.reader(before, rows)(rows), before.clone()
    old = [f.clone() for f in start.factors(before)]
    A, B = start.factors(after)
    A.mul_(1.5)
    B.add_(0.1)
    change = layout.scaling * (seen.x @ A.T @ B.T - seen.x @ old[0].T @ old[1].T)
    torch.testing.assert_close(start.reader(after, rows)(rows).hidden, seen.hidden + change, atol=1e-4, rtol=1e-4)


def test_slopes_are_what_a_small_step_changes(base: Base) -> None:
    layout = LoraLayout.from_model(base.model, r=4)
    start, tokens = AnswerStart(Resident(base, layout)), torch.tensor([3, 7, 200])
    hidden = torch.randn(base.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    slopes = start.slopes(hidden, tokens)
    for i in range(0, len(hidden), 7):
        step = torch.zeros_like(hidden)
        step[i] = 1e-2
        with torch.no_grad():
            up, down = (start.logits((hidden + s)[None])[0, tokens] for s in (step, -step))
        torch.testing.assert_close(slopes[:, i], (up - down) / 2e-2, atol=1e-3, rtol=1e-2)


@torch.no_grad()
def test_small_differences_of_logits_survive_a_base_in_bfloat16(base: Base) -> None:
    half = Base(copy.deepcopy(base.model).to(torch.bfloat16), base.tokenizer, "tiny", "f" * 64)
    start = AnswerStart(Resident(half, LoraLayout.from_model(half.model, r=4)))
    rng, tokens = torch.Generator().manual_seed(0), torch.arange(3, 200)
    hidden, step = (torch.randn(6, half.model.config.hidden_size, generator=rng) for _ in range(2))
    exact = copy.deepcopy(half.model).double()

    def moved(logits: Callable[[Tensor], Tensor]) -> Tensor:
        return logits(hidden + 1e-2 * step) - logits(hidden)

    truth = moved(lambda h: exact.lm_head(exact.model.norm(h.double()))[:, tokens]).float()
    ours = moved(lambda h: start.logits_of(tokens, h))
    assert (ours - truth).norm() < 0.02 * truth.norm()
    assert (moved(start.logits)[:, tokens] - truth).norm() > 0.3 * truth.norm()  # what it is there for


def test_a_base_without_lora_on_its_last_mlp_has_no_module(base: Base) -> None:
    queries = LoraLayout.from_model(base.model, r=4, target_modules=("q_proj",))
    assert AnswerStart(Resident(base, queries)).module is None
    assert AnswerStart(Resident(base, LoraLayout.from_model(base.model, r=4))).module == "model.layers.1.mlp.down_proj"
