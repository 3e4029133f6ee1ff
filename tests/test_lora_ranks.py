"""A LoRA at a larger rank: the same change to the base, there and back exactly."""

from __future__ import annotations

import pytest
import torch
from adapter_folders import TINY
from helpers import random_flat
from hypothesis import given
from hypothesis import strategies as st

from dnd_sdk.errors import LayoutMismatchError
from dnd_sdk.lora import MAX_RANK, LoraLayout, narrowed, widened


def changes(flat: torch.Tensor, layout: LoraLayout) -> list[torch.Tensor]:
    """What it adds to each weight."""
    views = [view for _, view in layout.views(flat)]
    return [layout.scaling * B @ A for A, B in zip(views[::2], views[1::2], strict=True)]


@given(st.integers(1, MAX_RANK), st.integers(1, MAX_RANK), st.floats(0.1, 64))
def test_widening_changes_nothing_and_can_be_undone(r: int, more: int, alpha: float) -> None:
    """Property: any rank to any larger one."""
    small, large = sorted((r, more))
    layout = LoraLayout(small, alpha, TINY.target_modules, TINY.modules)
    wide, flat = layout.at_rank(large), random_flat(layout)
    out = widened(flat, layout, wide)
    for a, b in zip(changes(flat, layout), changes(out, wide), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(narrowed(out, wide, layout), flat)
    assert wide.can_hold(layout) and layout.can_hold(wide) == (small == large)


def test_another_layout_is_refused() -> None:
    fewer = LoraLayout(8, 16.0, ("q_proj",), TINY.modules[:1])
    for other in (fewer, LoraLayout(8, 8.0, TINY.target_modules, TINY.modules)):
        with pytest.raises(LayoutMismatchError, match="modules and scaling must be the same"):
            widened(random_flat(TINY), TINY, other)
    assert TINY.at_rank(8).can_hold(fewer) and not fewer.can_hold(TINY)
    with pytest.raises(LayoutMismatchError, match="has 3 values"):
        widened(torch.zeros(3), TINY, TINY)
