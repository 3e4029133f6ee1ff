"""Where keys and values of running requests lie: fixed rows that are written in place.

* While a prompt is read its request has a tensor of its own, as long as the prompt.
* While an answer is written it has a row of a lane: rows of one length, side by side, so that attention over them all
  is one product without copies. A row that outgrows its lane moves to one twice as long; the last row of a lane takes
  the place of one that ends, so that rows in use are always the first ones.
* A lane also holds its rows' adapters, packed, once they differ: a step then reads every row's own without a gather.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Row = TypeVar("Row")

SHORTEST = 256
"""Tokens of a row in the first lane; each further lane has twice as many."""


class KeyValueShape(NamedTuple):
    """What a base keeps of one token."""

    n_layers: int
    n_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Of keys and values of all layers."""
        return 2 * self.n_layers * self.n_heads * self.head_dim * self.dtype.itemsize

    def empty(self, *lead: int) -> Tensor:
        """Keys (0) and values (1) `(layers, 2, *lead, heads, head width)`, zeros: what is masked must be finite."""
        size = (self.n_layers, 2, *lead, self.n_heads, self.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)


class Lane(Generic[Row]):
    """Rows of one length; the first `len(rows)` are in use."""

    def __init__(self, shape: KeyValueShape, length: int) -> None:
        self.length, self.rows = length, list[Row]()
        self._shape = shape
        self.kv = shape.empty(1, length)
        """`(layers, 2, rows, length, heads, head width)`."""
        self.adapters: Tensor | None = None
        """`(rows, P)`, packed; None as long as all rows have had the same."""

    def add(self, row: Row, kv: Tensor) -> int:
        """Take a row with what is known of it, `(layers, 2, tokens, heads, head width)`; returns its place."""
        place = len(self.rows)
        if place == self.kv.shape[2]:
            self._grow(2 * place)
        self.kv[:, :, place, : kv.shape[2]].copy_(kv)
        # what is masked counts nothing only if it is finite, and the last row here may have had an adapter that is not
        self.kv[:, :, place, kv.shape[2] :].zero_()
        self.rows.append(row)
        return place

    def remove(self, place: int) -> Row | None:
        """Free a place; returns the row that has moved there, None where it was the last."""
        last = self.rows.pop()
        if place == len(self.rows):
            return None
        self.rows[place] = last
        # from (layers, 2, rows, ...) to the same, one row each
        self.kv[:, :, place].copy_(self.kv[:, :, len(self.rows)])
        if self.adapters is not None:
            self.adapters[place].copy_(self.adapters[len(self.rows)])
        return last

    def adapters_like(self, packed: Tensor) -> Tensor:
        """`adapters`, made for vectors like this one `(P,)` if there are none; what is in them is not said."""
        if self.adapters is None:
            self.adapters = packed.new_zeros(self.kv.shape[2], packed.shape[0])
        return self.adapters

    def hold(self, n_rows: int) -> None:
        """Have so many rows, in use or not."""
        if n_rows > self.kv.shape[2]:
            self._grow(n_rows)

    def _grow(self, n_rows: int) -> None:
        n, adapters = len(self.rows), None
        grown = self._shape.empty(n_rows, self.length)
        grown[:, :, :n].copy_(self.kv[:, :, :n])
        if self.adapters is not None:
            adapters = self.adapters.new_zeros(n_rows, self.adapters.shape[1])
            adapters[:n].copy_(self.adapters[:n])
        self.kv, self.adapters = grown, adapters  # both or none, where memory is short


class Lanes(Generic[Row]):
    """All lanes of one base, made when a row needs them."""

    def __init__(self, shape: KeyValueShape) -> None:
        self.shape = shape
        self._lanes: dict[int, Lane[Row]] = {}

    def lane_for(self, n_tokens: int) -> Lane[Row]:
        """The shortest lane whose rows hold so many tokens."""
        length = SHORTEST
        while length < n_tokens:
            length *= 2
        if length not in self._lanes:
            self._lanes[length] = Lane(self.shape, length)
        return self._lanes[length]

    def free(self) -> None:
        """Give the memory of lanes back that nobody uses."""
        self._lanes = {length: lane for length, lane in self._lanes.items() if lane.rows}
