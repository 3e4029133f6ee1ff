"""Per-row LoRA against plain peft, base rows against the plain model, and threads against each other."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import FAMILIES, SAME_MATHS, random_flat, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.lora.linear import attach_lora, tables_from_flat, use_lora

RANK = 3


def some_tokens(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, 260, (batch, length), generator=torch.Generator().manual_seed(5))


def peft_twin(family: str, layout: LoraLayout, flat: Tensor) -> PeftModel:
    config = LoraConfig(r=layout.r, lora_alpha=layout.lora_alpha, target_modules=list(layout.target_modules))
    twin = get_peft_model(tiny_model(family), config).eval()
    weights = {s.peft_key.replace(".weight", ".default.weight"): v for s, v in layout.views(flat)}
    missing = twin.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    return twin


def attached(family: str = "llama") -> tuple[PreTrainedModel, LoraLayout]:
    model = tiny_model(family)
    layout = LoraLayout.from_model(model, r=RANK)
    attach_lora(model, layout)
    return model, layout


def bank(layout: LoraLayout, n: int = 3) -> Tensor:
    """Row 0 is zeros (the base), then n - 1 random adapters."""
    return torch.stack([torch.zeros(layout.n_parameters), *(random_flat(layout, seed=s) for s in range(1, n))])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_equals_peft(family: str) -> None:
    model, layout = attached(family)
    flats, ids = bank(layout), some_tokens()
    with use_lora(tables_from_flat(layout, flats), 1):
        ours = model(ids).logits
    peft = peft_twin(family, layout, flats[1])(input_ids=ids).logits
    assert not torch.allclose(ours, model(ids).logits, atol=1e-2)  # the adapter does something
    torch.testing.assert_close(ours, peft, **SAME_MATHS)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_equals_its_own_peft_model(family: str) -> None:
    model, layout = attached(family)
    flats, ids = bank(layout), some_tokens()
    with use_lora(tables_from_flat(layout, flats), torch.tensor([2, 0, 1])):
        ours = model(ids).logits
    for row, adapter in enumerate([2, 0, 1]):
        peft = peft_twin(family, layout, flats[adapter])(input_ids=ids).logits
        torch.testing.assert_close(ours[row], peft[row], **SAME_MATHS)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["unused", "uniform", "mixed"])
def test_base_rows_are_bit_identical(family: str, mode: str) -> None:
    plain = tiny_model(family)(some_tokens()).logits
    model, layout = attached(family)
    tables = tables_from_flat(layout, bank(layout))
    if mode == "unused":
        assert torch.equal(model(some_tokens()).logits, plain)
        return
    with use_lora(tables, 0 if mode == "uniform" else torch.tensor([0, 1, 0])):
        ours = model(some_tokens()).logits
    assert torch.equal(ours[[0, 2]], plain[[0, 2]])


@torch.no_grad()
def test_swapping_back_and_forth_restores_the_first_adapters_logits() -> None:
    model, layout = attached()
    tables, ids = tables_from_flat(layout, bank(layout)), some_tokens()
    logits = []
    for adapter in (1, 2, 1):
        with use_lora(tables, adapter):
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[2]) and not torch.allclose(logits[0], logits[1], atol=1e-2)


def test_an_error_inside_the_block_does_not_leave_the_adapter_on() -> None:
    model, layout = attached()
    plain = model(some_tokens()).logits
    with pytest.raises(RuntimeError, match="boom"), use_lora(tables_from_flat(layout, bank(layout)), 1):
        raise RuntimeError("boom")
    assert torch.equal(model(some_tokens()).logits, plain)


def test_tables_fold_the_scaling_into_b_only() -> None:
    layout = LoraLayout.from_model(tiny_model(), r=4, lora_alpha=12)
    flats = bank(layout)
    (a_segment, a), (b_segment, b) = list(layout.views(flats))[:2]
    table_a, table_b = tables_from_flat(layout, flats)[a_segment.module]
    assert a_segment.module == b_segment.module
    assert torch.equal(table_a, a) and torch.equal(table_b, b * 3)


@pytest.mark.parametrize("rows", [1, torch.tensor([1, 0, 1])])
def test_gradient_flows_to_the_tables_and_equals_pefts(rows: int | Tensor) -> None:
    model, layout = attached()
    flats = bank(layout, 2).requires_grad_()
    ids = some_tokens()
    with use_lora(tables_from_flat(layout, flats), rows):
        logits = model(ids).logits
    chosen = slice(None) if isinstance(rows, int) else [0, 2]
    logits[chosen].square().mean().backward()
    assert flats.grad is not None and (flats.grad[0] == 0).all()  # the base row took no part

    twin = peft_twin("llama", layout, flats[1].detach())
    for n, p in twin.named_parameters():
        p.requires_grad_("lora_" in n)
    twin(input_ids=ids).logits[chosen].square().mean().backward()
    grads = dict(twin.named_parameters())
    for s, g in layout.views(flats.grad[1]):
        expected = grads[s.peft_key.replace(".weight", ".default.weight")].grad
        torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-7)


def test_two_threads_with_different_adapters_never_mix() -> None:
    model, layout = attached()
    tables, ids = tables_from_flat(layout, bank(layout)), some_tokens()
    expected, wrong = {}, []
    with torch.no_grad():
        for adapter in (1, 2):
            with use_lora(tables, adapter):
                expected[adapter] = model(ids).logits
    start = threading.Barrier(3)

    def work(adapter: int | None) -> None:
        start.wait()
        for _ in range(20):
            if adapter is None:
                got, want = model(ids).logits, plain
            else:
                with use_lora(tables, adapter):
                    got, want = model(ids).logits, expected[adapter]
            if not torch.equal(got, want):
                wrong.append(adapter)

    plain = model(ids).logits
    threads = [threading.Thread(target=work, args=(a,)) for a in (1, 2, None)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
