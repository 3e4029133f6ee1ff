"""LoRA for a forward whose tokens belong to several requests, each with its own adapter or none.

A plan is made once per forward, on the host: the flat list of tokens is cut into segments. A segment of the base adds
nothing (its values are the plain model's, bit for bit); one with a single adapter costs two products; one in which
every token has its own adapter costs two batched products, however many there are.

Adapters are applied in their own precision: beside a bfloat16 base on a CPU they are float32, in which small products
are several times faster there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dnd_sdk.lora.packing import GroupViews, Packing

_ALONE = 32_768
"""Values that one thread of a CPU adds by itself."""


class TokenSegment(NamedTuple):
    """Neighbouring tokens of a forward."""

    n: int
    """Tokens, or batch rows where the plan is made `per_row`."""
    views: tuple[GroupViews, ...] | None
    """Groups of one adapter, A `(n r, in)`, or of one per token, A `(tokens, n r, in)`; None: the base."""


class SegmentedLora:
    """What `using` takes for one or more forwards of the same shape; not for several threads at once."""

    def __init__(self, packing: Packing, segments: Sequence[TokenSegment], *, per_row: bool = False) -> None:
        """`per_row`: segments count rows of a padded batch `(B, T)`, else tokens of a flat forward."""
        self._places, self._r = packing.places, packing.layout.r
        self._segments, self._per_row = segments, per_row
        self._read: tuple[Tensor, int] | None = None
        """The states that were projected last, and for which group."""
        self._projected: list[tuple[slice | None, GroupViews, Tensor]] = []

    def add(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """`out` `(..., out)` of module `name` with the adapters' changes for its input `x` `(..., in)`, in place."""
        place = self._places.get(name)
        if place is None:
            return out
        if self._read is None or self._read[0] is not x or self._read[1] != place.group:
            self._project(x, place.group)
        flat, r, i = out.view(-1, out.shape[-1]), self._r, place.member  # (..., out) -> (T, out)
        for where, group, low in self._projected:
            own, B, target = low[..., i * r : (i + 1) * r], group.B[i], flat if where is None else flat[where]
            if B.dim() == 3:  # (n, 1, r) x (n, r, out) -> (n, 1, out)
                _add_product(target[:, None], own, B, torch.bmm, torch.Tensor.baddbmm_)
            else:  # (n, r) x (r, out) -> (n, out)
                _add_product(target, own, B, torch.mm, torch.Tensor.addmm_)
        return out

    def _project(self, x: Tensor, group: int) -> None:
        """The product with the group's A matrices, for all of its modules."""
        self._read, self._projected = (x, group), []
        flat = x.reshape(-1, x.shape[-1])  # (..., in) -> (T, in)
        n_rows = sum(segment.n for segment in self._segments)
        unit = flat.shape[0] // n_rows if self._per_row else 1
        at = 0
        for segment in self._segments:
            where = None if segment.n == n_rows else slice(at * unit, (at + segment.n) * unit)
            at += segment.n
            if segment.views is None:
                continue
            views = segment.views[group]
            states = (flat if where is None else flat[where]).to(views.A.dtype)
            if views.A.dim() == 3:  # (n, 1, in) x (n, in, n r) -> (n, 1, n r)
                low = torch.bmm(states[:, None], views.A.transpose(1, 2))
            else:  # (n, in) x (in, n r) -> (n, n r)
                low = torch.mm(states, views.A.T)
            self._projected.append((where, views, low))


def _add_product(
    target: Tensor, x: Tensor, y: Tensor, product: Callable[..., Tensor], add_product: Callable[..., Tensor]
) -> None:
    if y.dtype == target.dtype:
        add_product(target, x, y)
        return
    added = product(x, y)
    # torch shares work out among threads from this size on, and waits for them longer than the work takes
    few = max(1, _ALONE // added[0].numel())
    if few < len(added) <= 4 * few:
        for some, theirs in zip(target.split(few), added.split(few), strict=True):
            some.add_(theirs)
    else:
        target.add_(added)
