"""LoRA for a forward whose tokens belong to several requests, each with its own adapter or none.

A plan is made once per forward, on the host: the flat list of tokens is cut into segments. A segment of the base adds
nothing (its values are the plain model's, bit for bit); one with a single adapter costs two products; one in which
every token has its own adapter costs two batched products, however many there are.

Adapters are applied in their own precision: beside a bfloat16 base on a CPU they are float32, in which small products
are several times faster there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dnd_sdk.lora.packing import GroupViews, Packing

_ALONE = 32_768
"""Values that one thread of a CPU adds by itself; torch shares out more, and waits longer for its threads than they
work.
"""


class TokenSegment(NamedTuple):
    """Neighbouring tokens of a forward."""

    n: int
    """Tokens, or batch rows where the plan is made `per_row`."""
    views: tuple[GroupViews, ...] | None
    """Groups of one adapter, A `(in, n r)`, or of one per token, A `(tokens, in, n r)`; None: the base."""


class _Projected(NamedTuple):
    """A segment's states after the A product of one group."""

    where: slice | None
    """Of the forward's tokens; None: all."""
    low: tuple[Tensor, ...]
    """Per module of the group `(n, r)`, or `(n, 1, r)` where every token has its own adapter."""
    B: tuple[Tensor, ...]


class SegmentedLora:
    """What `using` takes for one or more forwards of the same shape; not for several threads at once.

    Between two large products the code of small ones is no longer in a CPU's caches, so what counts there is how many
    calls there are.
    """

    def __init__(self, packing: Packing, segments: Sequence[TokenSegment], *, per_row: bool = False) -> None:
        """`per_row`: segments count rows of a padded batch `(B, T)`, else tokens of a flat forward."""
        self._places, self._r = packing.places, packing.layout.r
        self._segments, self._per_row = segments, per_row
        self._n = sum(segment.n for segment in segments)
        self._x: Tensor | None = None
        """The states that were projected last, and for which group."""
        self._group = -1
        self._projected: list[_Projected] = []

    def add(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """`out` `(..., out)` of module `name` with the adapters' changes for its input `x` `(..., in)`, in place."""
        place = self._places.get(name)
        if place is None:
            return out
        group, member = place
        if self._x is not x or self._group != group:
            self._x, self._group = x, group
            self._projected = self._project(x, group)
        flat = out.view(-1, out.shape[-1])  # (..., out) -> (T, out)
        for where, low, B in self._projected:
            _add_product(flat if where is None else flat[where], low[member], B[member])
        return out

    def _project(self, x: Tensor, group: int) -> list[_Projected]:
        flat = x.view(-1, x.shape[-1])  # (..., in) -> (T, in)
        unit = flat.shape[0] // self._n if self._per_row else 1
        found, at = [], 0
        for segment in self._segments:
            where = None if segment.n == self._n else slice(at * unit, (at + segment.n) * unit)
            at += segment.n
            if segment.views is None:
                continue
            A, B = segment.views[group]
            states = (flat if where is None else flat[where]).to(A.dtype)
            # (n, in) x (in, n r) -> (n, n r), or (n, 1, in) x (n, in, n r) -> (n, 1, n r)
            low = torch.mm(states, A) if A.dim() == 2 else torch.bmm(states[:, None], A)
            found.append(_Projected(where, low.split(self._r, dim=-1), B))
        return found


def _add_product(target: Tensor, low: Tensor, B: Tensor) -> None:
    """Add `low` times B to `target` `(n, out)`: `(n, r) x (r, out)`, or `(n, 1, r) x (n, r, out)`."""
    if B.dim() == 3:
        target = target[:, None]  # (n, out) -> (n, 1, out)
        if B.dtype == target.dtype:
            target.baddbmm_(low, B)
        else:
            _add(target, torch.bmm(low, B))
    elif B.dtype == target.dtype:
        target.addmm_(low, B)
    else:
        _add(target, torch.mm(low, B))


def _add(target: Tensor, added: Tensor) -> None:
    n, few = len(added), max(1, _ALONE // added.shape[-1])
    if few < n <= 4 * few:
        for some, theirs in zip(target.split(few), added.split(few), strict=True):
            some.add_(theirs)
    else:
        target.add_(added)
