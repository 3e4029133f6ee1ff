"""The same LoRA at a larger rank: rows of A and columns of B that are zero, the scaling as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnd_sdk.errors import LayoutMismatchError
from dnd_sdk.lora.layout import LoraLayout

if TYPE_CHECKING:
    from torch import Tensor


def widened(flat: Tensor, layout: LoraLayout, wide: LoraLayout) -> Tensor:
    """`flat` `(P,)` of `layout` as a vector of `wide`, which is `layout.at_rank` of a larger rank.

    Raises `LayoutMismatchError` for any other layout.
    """
    return _at_rank(flat, layout, wide)


def narrowed(flat: Tensor, wide: LoraLayout, layout: LoraLayout) -> Tensor:
    """Inverse of `widened`: what is beyond the rank of `layout` is left out."""
    return _at_rank(flat, wide, layout)


def _at_rank(flat: Tensor, old: LoraLayout, new: LoraLayout) -> Tensor:
    if old.digest == new.digest:
        old.check_size(flat.shape[-1])
        return flat
    small, large = sorted((old, new), key=lambda layout: layout.r)
    if not small.widens_to(large):
        raise LayoutMismatchError(
            f"a LoRA of rank {old.r} on {len(old.modules)} modules cannot become one of rank {new.r} on "
            f"{len(new.modules)}: modules and scaling must be the same"
        )
    out, r = flat.new_zeros(new.n_parameters), small.r
    for (segment, source), (_, target) in zip(old.views(flat), new.views(out), strict=True):
        if segment.part == "lora_A":
            target[:r] = source[:r]  # (r, in)
        else:
            target[:, :r] = source[:, :r]  # (out, r)
    return out
