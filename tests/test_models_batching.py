"""Groups keep the order, hold all, and grow as long as they fit."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dnd_sdk.models import grouped


@given(st.lists(st.integers(0, 20)), st.integers(1, 30))
def test_groups_are_as_long_as_they_may_be(order: list[int], most: int) -> None:
    groups = list(grouped(order, lambda g: sum(g) <= most))
    assert [i for g in groups for i in g] == order and all(groups)
    assert all(sum(g) <= most or len(g) == 1 for g in groups)
    assert all(sum(g) + following[0] > most for g, following in pairwise(groups))
