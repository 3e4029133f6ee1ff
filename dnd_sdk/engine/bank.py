"""The slot bank: every resident adapter is one packed vector in a slot, and who lost his comes back without work.

* A slot's row is a packed vector (`slot_memory.py`, `lora/packing.py`), its matrices views of it. Row 0 is the base.
* Weights are validated and packed, then put into a row nobody reads, then published: a reader never sees a torn adapter
  and a refused one changes nothing.
* Who loses the slot to another goes to host memory as he is (`host_tier.py`): on the host itself that and the way back
  move a reference, on a device they are a copy each.
* One writer at a time, so an id is loaded once however many threads ask for it; running requests never wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from dnd_sdk.engine.host_tier import HostTier
from dnd_sdk.engine.slot_memory import Packed, slot_memory
from dnd_sdk.engine.slot_table import SlotTable
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, BankFullError, LayoutMismatchError
from dnd_sdk.lora import GroupViews, LoraLayout, Packing, Segment, SegmentedLora, TokenSegment

Loader = Callable[[], Tensor]
"""Brings an adapter's flat vector, e.g. from the store."""

Fetch = Callable[[str], Tensor]
"""Brings it by the adapter's id; raises `AdapterNotFoundError` for one it does not know."""

IsStored = Callable[[str], bool]
"""Whether there still is an adapter of that id, so that what is kept of it may be used."""

WAIT_S = 30.0
"""How long a load waits for a running request to free a slot."""


class BroughtIn(NamedTuple):
    """How many adapters a bank has brought into a slot so far, by where they came from."""

    from_host: int
    """Kept in host memory since they lost their slot."""
    from_loader: int
    """From disk, as a rule."""


class SlotBank:
    """`n_slots` adapters of one layout on one device; thread-safe."""

    def __init__(
        self,
        layout: LoraLayout,
        n_slots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        fetch: Fetch | None = None,
        is_stored: IsStored | None = None,
        kept_bytes: int = 0,
        wait_s: float = WAIT_S,
    ) -> None:
        """Of adapters that lose their slot as many as `kept_bytes` hold are kept in host memory.

        `fetch` brings the others back when they are leased; None: an adapter must be resident or kept by then.
        `is_stored` None: what is kept may always be used. Raises `ConfigError` when the device has not enough memory.
        """
        self.layout, self._fetch, self._is_stored = layout, fetch, is_stored
        self.packing = Packing(layout)
        self._table, self.wait_s = SlotTable(n_slots, wait_s), wait_s
        self._dtype = dtype
        self._memory = slot_memory(self.packing, self.n_slots, torch.device(device), dtype)
        self._kept = HostTier(kept_bytes)
        self._brought_in = BroughtIn(0, 0)
        self._writing = threading.RLock()

    @property
    def n_slots(self) -> int:
        """How many adapters can be resident at once."""
        return self._table.n_slots

    def load(self, adapter_id: str, flat: Tensor) -> None:
        """Make the flat vector `(P,)` usable under `adapter_id`; nothing happens when that id is resident.

        Ids stand for content: other weights need another id, or `evict` first.
        Raises `LayoutMismatchError` (size), `AdapterCorruptError` (a value that is not finite in the bank's dtype)
        or `BankFullError`; the bank is then as it was.
        """
        self.ensure(adapter_id, lambda: flat)

    def ensure(self, adapter_id: str, loader: Loader) -> None:
        """Like `load`, with `loader` called only when the adapter is neither resident nor kept, and not held on to."""
        if not self._table.touch(adapter_id):
            with self._writing:
                self._bring_in(adapter_id, loader)

    @property
    def can_fetch(self) -> bool:
        """Whether an adapter that is in no slot is brought in when it is leased."""
        return self._fetch is not None

    def room(self, adapter_ids: Iterable[str]) -> int:
        """How many of these adapters can be resident at once, beside what is pinned."""
        return self._table.room(adapter_ids)

    @contextmanager
    def lease(self, adapter_ids: Sequence[str | None]) -> Iterator[tuple[int, ...] | int]:
        """Keep these adapters in place inside the block; yields the bank row per batch row for `adapted` or `use_lora`.

        None is the base. Yields an int when all rows use one adapter (0: all base), else one int per batch row.
        Raises `AdapterNotFoundError` for an id that is not resident and cannot be brought back, `BankFullError` when
        the adapters do not fit beside the pinned ones.
        """
        distinct = list(dict.fromkeys(i for i in adapter_ids if i is not None))
        rows = self._table.lease(distinct)
        if rows is None:
            rows = self._lease_missing(distinct)
        try:
            picked = [0 if i is None else rows[i] for i in adapter_ids]
            yield picked[0] if len(set(picked)) == 1 else tuple(picked)
        finally:
            self._table.release(distinct)

    def try_lease(self, adapter_id: str, spare: Collection[str] = ()) -> tuple[int, int] | None:
        """The adapter's row, kept in place until `release`, and which loading of the bank it is; None: not now.

        It takes the slot of none in `spare`, and nobody waits here: not for a running request to end, and not for a
        load that does. Raises what fetching the adapter raises.
        """
        leased = self._table.lease_one(adapter_id)
        if leased is None and self._writing.acquire(blocking=False):
            try:
                if self._table.has_room(spare):  # else nothing is fetched in vain
                    self._bring_in(adapter_id, self._fetching(adapter_id), spare, wait=False)
                    leased = self._table.lease_one(adapter_id)
            except BankFullError:
                return None
            finally:
                self._writing.release()
        return leased

    def look_up(self, adapter_id: str, loader: Loader | None = None) -> None:
        """Raise what loading the adapter raises; it is in a slot then or, while none is free, kept in host memory.

        `loader` None: it is fetched. Nobody waits here for a running request to end.
        """
        if self._table.touch(adapter_id):
            return
        with self._writing, suppress(BankFullError):
            self._bring_in(adapter_id, loader or self._fetching(adapter_id), wait=False, keep=True)

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for a slot."""
        return self._table.is_awaited

    def frees(self, adapter_id: str, n_leases: int) -> bool:
        """Whether the adapter's slot can be had once so many leases are given back."""
        return self._table.frees(adapter_id, n_leases)

    def full(self) -> BankFullError:
        """What is raised when no slot has become free in time."""
        return self._table.full()

    def release(self, adapter_id: str) -> None:
        """Give back a lease of `try_lease`."""
        self._table.release([adapter_id])

    def adapted(self, rows: tuple[int, ...] | int) -> SegmentedLora | None:
        """What a padded batch's forward is changed by, its rows as `lease` yields them; None: nothing, all are base."""
        if rows == 0:
            return None
        runs = [(rows, 1)] if isinstance(rows, int) else [(row, len(list(run))) for row, run in groupby(rows)]
        return SegmentedLora(self.packing, [TokenSegment(n, self.views(row)) for row, n in runs], per_row=True)

    def views(self, row: int) -> tuple[GroupViews, ...] | None:
        """The matrices of the adapter in a leased row; None for row 0, the base."""
        return self._memory[row].views if row else None

    def packed(self, row: int) -> Tensor:
        """The leased row itself, `(P,)` in packed order."""
        return self._memory[row].values

    def pin(self, adapter_id: str) -> None:
        """Never evict this resident adapter; at most `n_slots - 1` can be pinned."""
        self._table.pin(adapter_id, True)

    def unpin(self, adapter_id: str) -> None:
        """Undo `pin`."""
        self._table.pin(adapter_id, False)

    def evict(self, adapter_id: str) -> bool:
        """Free an adapter's slot and what is kept of it; False when it was not resident.

        Raises `BankFullError` while it is used.
        """
        with self._writing:
            self._unkeep(adapter_id)
            row = self._table.evict(adapter_id)
            if row is not None:
                self._memory.free(row)
            return row is not None

    def clear(self) -> None:
        """Free every slot that is not used, and all that is kept."""
        with self._writing:
            for adapter_id in self.resident():
                with suppress(BankFullError):  # a running request, or one that is just ending, still has it
                    self.evict(adapter_id)
            self._kept.clear()
            self._memory.release()

    def resident(self) -> list[str]:
        """Ids of the resident adapters, least recently used first."""
        return self._table.ids()

    def kept(self) -> list[str]:
        """Ids of the adapters that lost their slot and are kept in host memory, in the order in which they will go."""
        with self._writing:
            return self._kept.ids()

    @property
    def brought_in(self) -> BroughtIn:
        """How many adapters came into a slot so far; whatever else was asked for was in one."""
        return self._brought_in

    def _lease_missing(self, distinct: list[str]) -> dict[str, int]:
        # only a writer waits while it holds leases, and there is one writer: no two requests can wait for each other
        held: dict[str, int] = {}
        with self._writing:
            self._table.check_room(distinct)
            try:
                for adapter_id in distinct:
                    self._bring_in(adapter_id, self._fetching(adapter_id))
                    held |= self._table.lease([adapter_id]) or {}
            except BaseException:
                self._table.release(held)
                raise
        return held

    def _fetching(self, adapter_id: str) -> Loader | None:
        return None if self._fetch is None else partial(self._fetch, adapter_id)

    def _bring_in(
        self,
        adapter_id: str,
        loader: Loader | None,
        spare: Collection[str] = (),
        *,
        wait: bool = True,
        keep: bool = False,
    ) -> None:
        """The caller holds `_writing`; `keep`: what finds no free slot is kept for when there is one."""
        if self._table.touch(adapter_id):
            return
        packed = self._kept_or_packed(adapter_id, loader)
        was_kept = self._kept.get(adapter_id) is packed
        try:
            row, loser = self._table.take_row(spare, wait=wait)
        except BaseException:
            if self._kept.get(adapter_id) is None:
                for gone in self._kept.keep(adapter_id, packed) if keep else [packed]:
                    self._memory.reuse(gone)
            raise
        try:
            self._exchange(adapter_id, packed, row, loser)
        except BaseException:
            self._table.give_back(row)
            raise
        self._table.publish(adapter_id, row)
        from_host, from_loader = self._brought_in
        self._brought_in = BroughtIn(from_host + was_kept, from_loader + (not was_kept))

    def _exchange(self, adapter_id: str, packed: Packed, row: int, loser: str | None) -> None:
        self._kept.drop(adapter_id)
        if loser is not None:
            for gone in self._kept.keep(loser, self._memory.take(row)):
                self._memory.reuse(gone)
        self._memory.put(row, packed)

    def _kept_or_packed(self, adapter_id: str, loader: Loader | None) -> Packed:
        kept = self._kept.get(adapter_id)
        if kept is not None:
            if self._is_stored is None or self._is_stored(adapter_id):
                return kept
            self._unkeep(adapter_id)  # what was removed is gone; the loader says so, or has it anew
        if loader is None:
            raise AdapterNotFoundError(
                f"adapter {adapter_id!r} is not in a slot", fix="load it (again), or pin it so that it stays"
            )
        return self._memory.pack(self._checked(adapter_id, loader()))

    def _unkeep(self, adapter_id: str) -> None:
        packed = self._kept.drop(adapter_id)
        if packed is not None:
            self._memory.reuse(packed)

    def _checked(self, adapter_id: str, flat: Tensor) -> Tensor:
        """The vector, if all of it is finite in the bank's dtype, scaled too."""
        if flat.dim() != 1:
            raise LayoutMismatchError(f"adapter {adapter_id!r}: expected a flat vector, got shape {tuple(flat.shape)}")
        self.layout.check_size(flat.numel())
        flat = flat.detach()
        limit = torch.finfo(self._dtype).max / max(1.0, abs(self.layout.scaling))
        low, high = torch.stack(torch.aminmax(flat)).tolist()
        if -limit <= low and high <= limit:  # False for NaN too
            return flat
        broken = next(s for s in self.layout.segments if not _within(flat[s.start : s.stop], limit))
        raise AdapterCorruptError(
            f"adapter {adapter_id!r}: {_describe(broken)} has values that are not finite in {self._dtype}",
            fix="make or fetch the adapter again",
        )


def _within(values: Tensor, limit: float) -> bool:
    return bool((values.abs() <= limit).all())


def _describe(segment: Segment) -> str:
    return f"tensor {segment.peft_key} {segment.shape}"
