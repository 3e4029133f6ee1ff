"""Cutting an ordered list into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator


def grouped(order: Iterable[int], fits: Callable[[list[int]], bool]) -> Iterator[list[int]]:
    """Consecutive groups, each as long as `fits` allows; a single item is a group even when it does not fit."""
    group: list[int] = []
    for i in order:
        if group and not fits([*group, i]):
            yield group
            group = []
        group.append(i)
    if group:
        yield group
