"""The slot bank: every resident adapter is one row of one contiguous arena, and a swap is one copy into a row.

* Arena `(S+1, P)` of packed vectors (`lora/packing.py`); every matrix is a view of it. Row 0 is zeros: the base.
* Weights are validated, then written into a row nobody reads, then published: a reader never sees a torn adapter and a
  refused one changes nothing.
* One writer at a time, so an id is loaded once however many threads ask for it; running requests never wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from dnd_sdk.engine.slot_table import SlotTable
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, BankFullError, ConfigError, LayoutMismatchError
from dnd_sdk.lora import GroupViews, LoraLayout, Packing, Segment, SegmentedLora, TokenSegment

Loader = Callable[[], Tensor]
"""Brings an adapter's flat vector, e.g. from the store."""

Fetch = Callable[[str], Tensor]
"""Brings it by the adapter's id; raises `AdapterNotFoundError` for one it does not know."""

WAIT_S = 30.0
"""How long a load waits for a running request to free a slot."""


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
        wait_s: float = WAIT_S,
    ) -> None:
        """`fetch` brings back what lost its slot when it is leased; None: an adapter must be resident by then."""
        self.layout, self._fetch = layout, fetch
        self.packing = Packing(layout)
        self._table, self.wait_s = SlotTable(n_slots, wait_s), wait_s
        try:
            with torch.inference_mode(False):  # an inference tensor could not be written to later
                self._arena = torch.zeros(self.n_slots + 1, layout.n_parameters, device=device, dtype=dtype)
        except (RuntimeError, MemoryError) as e:  # torch has no error of its own for a CPU without memory
            raise ConfigError(f"{self.n_slots} slots do not fit the memory of {device}", fix="lower n_slots") from e
        self.tables = self.packing.tables(self._arena)
        """Module name -> (A `(S+1, r, in)`, B `(S+1, out, r)`), for `use_lora`."""
        self._writing = threading.RLock()
        self._views: dict[int, tuple[GroupViews, ...]] = {}
        self._pinned: Tensor | None = None

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
        """Like `load`, with `loader` called only when the adapter is not resident; it is not kept."""
        if not self._table.touch(adapter_id):
            with self._writing:
                self._bring_in(adapter_id, loader)

    def room(self, adapter_ids: Iterable[str]) -> int:
        """How many of these adapters can be resident at once, beside what is pinned."""
        return self._table.room(adapter_ids)

    @contextmanager
    def lease(self, adapter_ids: Sequence[str | None]) -> Iterator[tuple[int, ...] | int]:
        """Keep these adapters in place inside the block; yields the bank row per batch row for `adapted` or `use_lora`.

        None is the base. Yields an int when all rows use one adapter (0: all base), else one int per batch row.
        Raises `AdapterNotFoundError` for an id that is neither resident nor can be fetched, `BankFullError` when the
        adapters do not fit beside the pinned ones.
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

    def look_up(self, adapter_id: str) -> None:
        """Raise what fetching the adapter raises; it is in a slot then, unless none is free."""
        if self._table.touch(adapter_id):
            return
        with self._writing, suppress(BankFullError):
            self._bring_in(adapter_id, self._fetching(adapter_id), wait=False)

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
        if row not in self._views:  # the arena stays where it is, so a row's views are made once
            self._views[row] = self.packing.views(self._arena[row])
        return self._views[row] if row else None

    def packed(self, row: int) -> Tensor:
        """The leased row itself, `(P,)` in packed order."""
        return self._arena[row]

    def pin(self, adapter_id: str) -> None:
        """Never evict this resident adapter; at most `n_slots - 1` can be pinned."""
        self._table.pin(adapter_id, True)

    def unpin(self, adapter_id: str) -> None:
        """Undo `pin`."""
        self._table.pin(adapter_id, False)

    def evict(self, adapter_id: str) -> bool:
        """Free an adapter's slot; False when it was not resident. Raises `BankFullError` while it is used."""
        with self._writing:
            return self._table.evict(adapter_id)

    def resident(self) -> list[str]:
        """Ids of the resident adapters, least recently used first."""
        return self._table.ids()

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
        self, adapter_id: str, loader: Loader | None, spare: Collection[str] = (), *, wait: bool = True
    ) -> None:
        # the caller holds `_writing`
        if self._table.touch(adapter_id):
            return
        if loader is None:
            raise AdapterNotFoundError(
                f"adapter {adapter_id!r} is not in a slot", fix="load it (again), or pin it so that it stays"
            )
        flat = self._checked(adapter_id, loader())
        row = self._table.take_row(spare, wait=wait)
        try:
            self._write(flat, self._arena[row])
        except BaseException:
            self._table.give_back(row)
            raise
        self._table.publish(adapter_id, row)

    def _write(self, flat: Tensor, row: Tensor) -> None:
        if flat.device == row.device:
            self.packing.pack(flat, row)
            return
        if self._pinned is None:  # packed here, so that what crosses to the device is one copy
            with torch.inference_mode(False):
                self._pinned = torch.empty(row.shape, dtype=row.dtype, pin_memory=row.is_cuda)
        self.packing.pack(flat.cpu(), self._pinned)
        row.copy_(self._pinned, non_blocking=True)
        if row.is_cuda:  # the buffer is used again by the next load
            torch.cuda.current_stream(row.device).synchronize()

    def _checked(self, adapter_id: str, flat: Tensor) -> Tensor:
        """The vector, if all of it is finite in the arena's dtype, scaled too."""
        if flat.dim() != 1:
            raise LayoutMismatchError(f"adapter {adapter_id!r}: expected a flat vector, got shape {tuple(flat.shape)}")
        self.layout.check_size(flat.numel())
        flat = flat.detach()
        limit = torch.finfo(self._arena.dtype).max / max(1.0, abs(self.layout.scaling))
        low, high = torch.stack(torch.aminmax(flat)).tolist()
        if -limit <= low and high <= limit:  # False for NaN too
            return flat
        broken = next(s for s in self.layout.segments if not _within(flat[s.start : s.stop], limit))
        raise AdapterCorruptError(
            f"adapter {adapter_id!r}: {_describe(broken)} has values that are not finite in {self._arena.dtype}",
            fix="make or fetch the adapter again",
        )


def _within(values: Tensor, limit: float) -> bool:
    return bool((values.abs() <= limit).all())


def _describe(segment: Segment) -> str:
    return f"tensor {segment.peft_key} {segment.shape}"
