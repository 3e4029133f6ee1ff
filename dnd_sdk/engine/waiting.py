"""Requests that wait for a row: whose turn is next.

Adapters take turns, and within one adapter it is first come, first served: neither a long list for one adapter nor many
requests for it keep those of another waiting.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from dnd_sdk.engine.row import Row


class Waiting:
    """Rows by adapter; not thread-safe."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str | None, deque[Row]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Row]:
        return (row for queue in self._queues.values() for row in queue)

    @property
    def adapters(self) -> set[str | None]:
        """Those that somebody waits for."""
        return set(self._queues)

    @property
    def first(self) -> list[Row]:
        """The next of each adapter."""
        return [queue[0] for queue in self._queues.values()]

    def add(self, row: Row) -> None:
        """Last of its adapter."""
        self._queues.setdefault(row.request.adapter_id, deque()).append(row)

    def of(self, adapter_id: str | None) -> list[Row]:
        """All of one adapter, the first to come first."""
        return list(self._queues.get(adapter_id, ()))

    def pick(self, usable: Callable[[Row], bool]) -> Row | None:
        """Take out the first row of the next adapter in turn whose first row is usable; None: there is none."""
        for adapter_id in list(self._queues):
            row = self._queues[adapter_id][0]
            if usable(row):
                self.remove(row)
                if adapter_id in self._queues:
                    self._queues.move_to_end(adapter_id)
                return row
        return None

    def remove(self, row: Row) -> None:
        """Take out this row."""
        queue = self._queues[row.request.adapter_id]
        queue.remove(row)
        if not queue:
            del self._queues[row.request.adapter_id]
