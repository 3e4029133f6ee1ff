"""Weight tokens: exact order and padding, values to fp32 rounding, whatever the shapes."""

from __future__ import annotations

import pytest
import torch
from helpers import FAMILIES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_sdk.generator.weight_tokenizer import BORDER, WeightTokenizer, chunk_width
from dnd_sdk.lora.layout import LoraLayout, LoraModule

PARTS = [("lora_A", "lora_B"), ("lora_B",), ("lora_A",)]


def layout_of(r: int, shapes: list[tuple[int, int]]) -> LoraLayout:
    modules = tuple(LoraModule(f"m{i}", a, b) for i, (a, b) in enumerate(shapes))
    return LoraLayout(r, 16.0, ("m",), modules)


def only(layout: LoraLayout, parts: tuple[str, ...], flat: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros_like(flat)
    for (s, view), (_, out) in zip(layout.views(flat), layout.views(kept), strict=True):
        if s.part in parts:
            out.copy_(view)
    return kept


@given(
    r=st.integers(1, 64),
    shapes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4),
    parts=st.sampled_from(PARTS),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(r: int, shapes: list[tuple[int, int]], parts: tuple[str, ...], seed: int) -> None:
    layout = layout_of(r, shapes)
    tokenizer = WeightTokenizer(layout, parts)
    flat = torch.randn(2, layout.n_parameters, generator=torch.Generator().manual_seed(seed))
    back = tokenizer.detokenise(tokenizer.tokenise(flat))
    torch.testing.assert_close(back, only(layout, parts, flat), rtol=1e-4, atol=2e-5)


@given(
    r=st.integers(1, 9), shapes=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=3)
)
@settings(max_examples=40, deadline=None)
def test_every_weight_stands_in_exactly_one_cell(r: int, shapes: list[tuple[int, int]]) -> None:
    tokenizer = WeightTokenizer(layout_of(r, shapes))
    where = tokenizer.cells[tokenizer.used]
    assert torch.equal(where.sort().values, torch.arange(tokenizer.layout.n_parameters))


def test_token_equals_a_chunk_cut_by_hand() -> None:
    layout = layout_of(2, [(200, 130)])
    tokenizer = WeightTokenizer(layout, ("lora_B",))
    flat = torch.randn(layout.n_parameters)
    B = dict((s.part, v) for s, v in layout.views(flat))["lora_B"]  # (130, 2)
    per = -(-130 // tokenizer.T)
    chunk = B[:per].T
    token = tokenizer.tokenise(flat)[0]
    torch.testing.assert_close(token[:2, :per], (chunk - chunk.mean()) / chunk.std(correction=0))
    torch.testing.assert_close(token[-BORDER:, 0], (chunk.mean() * 8).expand(2))
    torch.testing.assert_close(token[0, -BORDER:], (torch.log(0.9 * chunk.std(correction=0) + 0.1) + 1.6).expand(2))
    assert token[:2, per:-BORDER].isnan().all()


def test_constant_chunks_survive() -> None:
    layout = layout_of(3, [(70, 70)])
    tokenizer = WeightTokenizer(layout)
    for value in (0.0, 0.25):
        flat = torch.full((layout.n_parameters,), value)
        tokens = tokenizer.tokenise(flat)
        assert tokens[tokens == tokens].isfinite().all()
        torch.testing.assert_close(tokenizer.detokenise(tokens), flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_grid_follows_the_base(family: str) -> None:
    layout = LoraLayout.from_model(tiny_model(family), r=4)
    tokenizer = WeightTokenizer(layout)
    assert tokenizer.tokenise(torch.randn(layout.n_parameters)).shape == (tokenizer.T, 4 + BORDER, tokenizer.W)


def test_gradient_reaches_every_used_cell_and_no_other() -> None:
    layout = layout_of(2, [(65, 130)])
    tokenizer = WeightTokenizer(layout)
    tokens = torch.randn(tokenizer.T, tokenizer.H, tokenizer.W, requires_grad=True)
    (tokenizer.detokenise(tokens) * torch.randn(layout.n_parameters)).sum().backward()
    body = tokens.grad[:, :-BORDER, :-BORDER]
    assert (body[tokenizer.used] != 0).all()
    assert (body[~tokenizer.used] == 0).all()


def test_chunk_width_prefers_the_common_divisor() -> None:
    assert chunk_width([576, 192, 1536]) == 192
    assert chunk_width([17]) == 17
    assert 64 <= chunk_width([577, 191]) <= 256
