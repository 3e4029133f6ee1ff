"""What several sequences begin with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TypeVar

T = TypeVar("T")


def leading_alike(sequences: Sequence[Sequence[T]]) -> list[T]:
    """The longest run of items that all `sequences` (one at least) begin with."""
    columns = zip(*sequences, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
