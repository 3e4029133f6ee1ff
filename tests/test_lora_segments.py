"""LoRA by segments of a flat forward: what a plain product per token gives, and the base untouched."""

from __future__ import annotations

import pytest
import torch
from helpers import random_flat, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_sdk.lora import LoraLayout, Packing, SegmentedLora, TokenSegment, tables_from_flat

LAYOUT = LoraLayout.from_model(tiny_model(), r=4, lora_alpha=12)
PACKING = Packing(LAYOUT)
ADAPTERS = 3
FLATS = torch.stack([random_flat(LAYOUT, seed=i) for i in range(ADAPTERS)])
PACKED = torch.zeros(ADAPTERS + 1, LAYOUT.n_parameters)
for _i in range(ADAPTERS):
    PACKING.pack(FLATS[_i], PACKED[_i + 1])
TABLES = {name: (A.double(), B.double()) for name, (A, B) in tables_from_flat(LAYOUT, FLATS).items()}

SEGMENTS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, ADAPTERS)), min_size=1, max_size=5)


def plain(name: str, x: torch.Tensor, out: torch.Tensor, owners: list[int]) -> torch.Tensor:
    """Token by token, in float64; owner 0 is the base."""
    changed = out.double().clone()
    for t, owner in enumerate(owners):
        if owner:
            A, B = (table[owner - 1] for table in TABLES[name])
            changed[t] += B @ (A @ x[t].double())
    return changed


def inputs(n: int, dtype: torch.dtype = torch.float32) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> its states and its own output; q, k and v get the same states, as in a model."""
    rng, states = torch.Generator().manual_seed(n), {}
    made = {}
    for module in LAYOUT.modules:
        group = PACKING.places[module.name].group
        if group not in states:
            states[group] = torch.randn(1, n, module.in_features, generator=rng).to(dtype)
        made[module.name] = states[group], torch.randn(1, n, module.out_features, generator=rng).to(dtype)
    return made


@settings(deadline=None, max_examples=60)
@given(SEGMENTS, st.booleans())
def test_segments_equal_the_product_of_every_token(segments: list[tuple[int, int]], own: bool) -> None:
    owners = [owner for n, owner in segments for _ in range(n)]
    if own:  # one segment, every token with an adapter of its own
        plan = [TokenSegment(len(owners), PACKING.views(PACKED[owners]))]
    else:
        plan = [TokenSegment(n, PACKING.views(PACKED[owner]) if owner else None) for n, owner in segments]
    lora = SegmentedLora(PACKING, plan)
    for name, (x, out) in inputs(len(owners)).items():
        want, before = plain(name, x[0], out[0], owners), out.clone()
        got = lora.add(name, x, out)
        torch.testing.assert_close(got[0].double(), want, rtol=1e-4, atol=1e-4)
        base = [t for t, owner in enumerate(owners) if not owner]
        assert torch.equal(got[0, base], before[0, base])


def test_rows_of_a_padded_batch_count_as_rows() -> None:
    lora = SegmentedLora(
        PACKING, [TokenSegment(2, PACKING.views(PACKED[1])), TokenSegment(1, PACKING.views(PACKED[2]))], per_row=True
    )
    for name, (x, out) in inputs(12).items():
        want = plain(name, x[0], out[0], [1] * 8 + [2] * 4)
        got = lora.add(name, x.view(3, 4, -1), out.view(3, 4, -1))
        torch.testing.assert_close(got.flatten(0, 1).double(), want, rtol=1e-4, atol=1e-4)


def test_states_that_are_given_again_are_projected_once_and_others_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, projected = SegmentedLora(PACKING, [TokenSegment(3, PACKING.views(PACKED[1]))]), list[int]()
    project = SegmentedLora._project
    monkeypatch.setattr(
        SegmentedLora, "_project", lambda self, x, group: projected.append(group) or project(self, x, group)
    )
    for name, (x, out) in inputs(3).items():
        lora.add(name, x, out)
    assert projected == list(range(len(PACKING.groups)))
    q, k = (f"model.layers.0.self_attn.{m}_proj" for m in "qk")
    (x, out_q), (_, out_k) = (inputs(3)[name] for name in (q, k))
    other = x + 1
    lora.add(q, x, out_q)
    want = plain(k, other[0], out_k[0], [1] * 3)  # a base that gives k other states than q
    torch.testing.assert_close(lora.add(k, other, out_k)[0].double(), want, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_base_gets_float32_changes_rounded_once() -> None:
    lora = SegmentedLora(PACKING, [TokenSegment(2, PACKING.views(PACKED[1])), TokenSegment(2, None)])
    for name, (x, out) in inputs(4, torch.bfloat16).items():
        want = plain(name, x[0], out[0], [1, 1, 0, 0])
        got = lora.add(name, x, out)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got[0].double(), want, rtol=2**-8, atol=1e-3)


def test_another_bases_modules_stay_as_they_are() -> None:
    lora, out = SegmentedLora(PACKING, [TokenSegment(1, PACKING.views(PACKED[1]))]), torch.ones(1, 1, 3)
    assert lora.add("unknown", torch.ones(1, 1, 2), out) is out and torch.equal(out, torch.ones(1, 1, 3))
