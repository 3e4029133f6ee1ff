"""`Centres`: one vector per adapter, searched with FAISS for the few whose exemplars are worth comparing.

* Vectors are added behind those that readers know of, in the same memory: adding one copies no other.
* FAISS crashes when an index is changed while it is searched; a matrix that is only added to has no such moment.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

_FIRST = 64
"""Rows that there is room for at first; it is doubled when they are used up."""


class View(NamedTuple, Generic[T]):
    """The centres at one moment; nothing in it changes."""

    matrix: np.ndarray
    """(n, C), normalised."""
    owners: tuple[T | None, ...]
    """Of each row; None: removed."""
    n_live: int

    def nearest(self, query: np.ndarray, k: int) -> list[T]:
        """Owners of the `k` centres nearest to `query` (C,), in no order; all of them where there are no more."""
        if self.n_live <= k:
            return [owner for owner in self.owners if owner is not None]
        import faiss

        n_removed = len(self.owners) - self.n_live
        _, rows = faiss.knn(query[None], self.matrix, k + n_removed, metric=faiss.METRIC_INNER_PRODUCT)
        found = [owner for row in rows[0] if (owner := self.owners[row]) is not None]
        return found[:k]


class Centres(Generic[T]):
    """Grows and shrinks; one writer at a time, any number of readers of its `view`."""

    def __init__(self, width: int) -> None:
        self._matrix = np.empty((_FIRST, width), np.float32)
        self._rows: dict[str, int] = {}
        self.view: View[T] = View(self._matrix[:0], (), 0)

    def change(self, add: dict[str, tuple[np.ndarray, T]], remove: set[str]) -> None:
        """Add owners with their centres (C,) by name, replacing those of the same names, and remove others."""
        owners = list(self.view.owners)
        for name in (remove | add.keys()) & self._rows.keys():
            owners[self._rows.pop(name)] = None
        removed = len(owners) - len(self._rows)
        if len(owners) + len(add) > len(self._matrix) or removed > _FIRST + len(self._rows) // 8:
            owners = self._moved(owners, len(add))
        for name, (centre, owner) in add.items():
            self._rows[name] = len(owners)
            self._matrix[len(owners)] = centre
            owners.append(owner)
        self.view = View(self._matrix[: len(owners)], tuple(owners), len(self._rows))

    def _moved(self, owners: list[T | None], n_more: int) -> list[T | None]:
        """Room for more in another matrix, which holds the rows in use alone."""
        live = [i for i, owner in enumerate(owners) if owner is not None]
        matrix = np.empty((2 * (len(live) + n_more) + _FIRST, self._matrix.shape[1]), np.float32)
        matrix[: len(live)] = self._matrix[live]
        place = {old: new for new, old in enumerate(live)}
        self._rows = {name: place[row] for name, row in self._rows.items()}
        self._matrix = matrix
        return [owners[i] for i in live]
