"""Who sits in which row of the bank's arena: leases, pins, least-recently-used eviction. No tensors here.

One condition guards everything; nobody does slow work under it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dnd_sdk.config import whole_number
from dnd_sdk.errors import AdapterNotFoundError, BankFullError

MAX_SLOTS = 65_536
"""More adapters than anyone keeps resident; a larger number is a slip."""


@dataclass
class Slot:
    """One resident adapter."""

    row: int
    loading: int
    """The how-manieth of the bank: an adapter that is brought in anew gets another."""
    leases: int = 0
    pinned: bool = False

    @property
    def idle(self) -> bool:
        """Whether its row may be given to another adapter."""
        return self.leases == 0 and not self.pinned


class SlotTable:
    """Maps adapter ids to rows 1..n_slots, least recently used first."""

    def __init__(self, n_slots: int, wait_s: float) -> None:
        self.n_slots = n_slots = whole_number("n_slots", n_slots, 1, MAX_SLOTS)
        self.wait_s = wait_s
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._free = list(range(n_slots, 0, -1))
        self._loadings = 0
        self._n_awaited = 0
        self._changed = threading.Condition()

    def ids(self) -> list[str]:
        """Resident adapters, least recently used first."""
        with self._changed:
            return list(self._slots)

    def touch(self, adapter_id: str) -> bool:
        """Whether the adapter is resident; if so it now is the most recently used."""
        with self._changed:
            if adapter_id in self._slots:
                self._slots.move_to_end(adapter_id)
            return adapter_id in self._slots

    def lease(self, adapter_ids: Iterable[str]) -> dict[str, int] | None:
        """Rows of all these adapters with one more lease each, or None (and no lease) when one is not resident."""
        with self._changed:
            wanted = list(adapter_ids)
            if any(i not in self._slots for i in wanted):
                return None
            for i in wanted:
                self._slots.move_to_end(i)
                self._slots[i].leases += 1
            return {i: self._slots[i].row for i in wanted}

    def lease_one(self, adapter_id: str) -> tuple[int, int] | None:
        """Row and loading of this adapter with one more lease, or None when it is not resident."""
        rows = self.lease([adapter_id])
        return None if rows is None else (rows[adapter_id], self._slots[adapter_id].loading)

    def release(self, adapter_ids: Iterable[str]) -> None:
        """Give back one lease of each."""
        with self._changed:
            for i in adapter_ids:
                self._slots[i].leases -= 1
            self._changed.notify_all()

    def take_row(self, spare: Collection[str] = (), *, wait: bool = True) -> tuple[int, str | None]:
        """A row nobody reads: a free one, else the least recently used idle adapter's that is not in `spare`.

        Also who lost it; None: it was free. Waits for a running request to end, if it may; raises `BankFullError` when
        none does in time.
        """
        with self._changed:
            self._n_awaited += wait
            try:
                found = self._changed.wait_for(lambda: self._reclaimable(spare), self.wait_s if wait else 0.0)
            finally:
                self._n_awaited -= wait
            if not found:
                raise self.full()
            if self._free:
                return self._free.pop(), None
            victim = next(i for i, slot in self._slots.items() if slot.idle and i not in spare)
            return self._slots.pop(victim).row, victim

    def full(self) -> BankFullError:
        """What is raised when no slot has become free in time."""
        return BankFullError(
            f"all {self.n_slots} adapter slots are pinned or in use after waiting {self.wait_s:g} s",
            fix="unpin an adapter, close open streams, or make the engine with more n_slots",
        )

    def has_room(self, spare: Collection[str] = ()) -> bool:
        """Whether `take_row` would not wait."""
        with self._changed:
            return self._reclaimable(spare)

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for a row."""
        return self._n_awaited > 0

    def frees(self, adapter_id: str, n_leases: int) -> bool:
        """Whether the adapter's row can be had once so many leases are given back."""
        with self._changed:
            slot = self._slots.get(adapter_id)
            return slot is not None and not slot.pinned and slot.leases <= n_leases

    def _reclaimable(self, spare: Collection[str]) -> bool:
        return bool(self._free) or any(slot.idle and i not in spare for i, slot in self._slots.items())

    def give_back(self, row: int) -> None:
        """Return a taken row that was not published."""
        with self._changed:
            self._free.append(row)
            self._changed.notify_all()

    def publish(self, adapter_id: str, row: int) -> None:
        """Make a fully written row visible under this id."""
        with self._changed:
            self._loadings += 1
            self._slots[adapter_id] = Slot(row, self._loadings)
            self._changed.notify_all()

    def evict(self, adapter_id: str) -> int | None:
        """Forget an adapter; the row it had, None when it is not resident.

        Raises `BankFullError` while it is leased or pinned.
        """
        with self._changed:
            slot = self._slots.get(adapter_id)
            if slot is None:
                return None
            if not slot.idle:
                state = "pinned" if slot.pinned else f"used by {slot.leases} running request(s)"
                raise BankFullError(f"adapter {adapter_id!r} is {state}", fix="unpin it or let the requests end")
            self._free.append(self._slots.pop(adapter_id).row)
            self._changed.notify_all()
            return slot.row

    def pin(self, adapter_id: str, pinned: bool) -> None:
        """Keep an adapter resident (at most n_slots - 1 of them, so that others can still come in), or stop that."""
        with self._changed:
            slot = self._slots.get(adapter_id)
            if slot is None:
                raise AdapterNotFoundError(f"adapter {adapter_id!r} is not resident", fix="load it before pinning")
            others = sum(s.pinned for i, s in self._slots.items() if i != adapter_id)
            if pinned and others >= self.n_slots - 1:
                raise BankFullError(
                    f"{others} of {self.n_slots} adapter slots are pinned, one must stay free",
                    fix="unpin an adapter or make the engine with more n_slots",
                )
            slot.pinned = pinned
            self._changed.notify_all()

    def room(self, adapter_ids: Iterable[str]) -> int:
        """How many slots these adapters may have between them: all but those that others are pinned to."""
        with self._changed:
            wanted = set(adapter_ids)
            return self.n_slots - sum(s.pinned for i, s in self._slots.items() if i not in wanted)

    def check_room(self, adapter_ids: Iterable[str]) -> None:
        """Raise `BankFullError` when these adapters cannot be resident together, whoever else finishes."""
        wanted = set(adapter_ids)
        room = self.room(wanted)
        if len(wanted) > room:
            raise BankFullError(
                f"a batch with {len(wanted)} adapters needs as many slots, {room} of {self.n_slots} are not pinned",
                fix="use fewer adapters in one batch or make the engine with more n_slots",
            )
