"""Packed adapters: every value in its place, scaled, whatever the layers look like."""

from __future__ import annotations

import pytest
import torch
from helpers import FAMILIES, SAME_MATHS, random_flat, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_sdk.lora import LoraLayout, Packing, tables_from_flat
from dnd_sdk.lora.layout import LoraModule

WIDTHS = st.integers(1, 5)


def packed(layout: LoraLayout, flat: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((layout.n_parameters,), torch.nan, dtype=dtype)
    Packing(layout).pack(flat, out)
    return out


def matrices(layout: LoraLayout, out: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> (A `(r, in)`, B `(out, r)`), as the views of a packed vector give them."""
    packing, r = Packing(layout), layout.r
    views = packing.views(out)
    return {name: (views[g].A[:, i * r : (i + 1) * r].T, views[g].B[i].T) for name, (g, i) in packing.places.items()}


def check(layout: LoraLayout) -> None:
    """The packed matrices are those of `tables_from_flat`."""
    flat = random_flat(layout)
    out = packed(layout, flat)
    assert not out.isnan().any()
    found = matrices(layout, out)
    for name, (A, B) in tables_from_flat(layout, flat[None]).items():
        assert torch.equal(found[name][0], A[0])
        torch.testing.assert_close(found[name][1], B[0], **SAME_MATHS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_base_is_where_its_views_say(family: str) -> None:
    layout = LoraLayout.from_model(tiny_model(family, layers=3), r=4, lora_alpha=12)
    check(layout)
    sizes = [[m.name.rpartition(".")[2] for m in group] for group in Packing(layout).groups]
    assert sizes[:4] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["layers.0.", "layers.1.", "layers.2.", "", "head."]),
            st.sampled_from(["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.up_proj", "mlp.gate_proj", "x.q_proj"]),
            WIDTHS,
            WIDTHS,
        ),
        min_size=1,
        max_size=14,
        unique_by=lambda m: m[0] + m[1],
    ),
    st.integers(1, 3),
)
def test_any_layout_is_packed_whole(modules: list[tuple[str, str, int, int]], r: int) -> None:
    named = tuple(LoraModule(layer + name, n_in, n_out) for layer, name, n_in, n_out in modules)
    check(LoraLayout(r, 6.0, ("q_proj",), named))


def test_equal_layers_are_packed_together() -> None:
    layout = LoraLayout.from_model(tiny_model(layers=6), r=4, lora_alpha=12)
    assert [n_layers for _, n_layers, _ in Packing(layout)._blocks] == [6]
    few, many = (n_operations(LoraLayout.from_model(tiny_model(layers=n), r=4, lora_alpha=12)) for n in (2, 6))
    assert few == many


def n_operations(layout: LoraLayout) -> int:
    """How many operations that move values a packing takes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.n += func.overloadpacket.__name__ in ("copy_", "mul")
            return func(*args, **(kwargs or {}))

    flat, out = random_flat(layout), torch.empty(layout.n_parameters)
    with Counting() as counting:
        Packing(layout).pack(flat, out)
    return counting.n


def test_another_dtype_rounds_the_scaled_values_once() -> None:
    layout = LoraLayout.from_model(tiny_model(), r=4, lora_alpha=12)
    flat = random_flat(layout)
    exact, rounded = packed(layout, flat), packed(layout, flat, torch.bfloat16)
    assert torch.equal(exact.bfloat16(), rounded)
