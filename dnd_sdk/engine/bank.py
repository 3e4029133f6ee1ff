"""The slot bank: every resident adapter is one row of one contiguous arena, and a swap is one copy into a row.

* Arena `(S+1, P)`; each Linear's A `(S+1, r, in)` and B `(S+1, out, r)` are views of it. Row 0 is zeros: the base.
  B lies transposed in memory (fast for one-token decoding) and carries the layout's scaling.
* Weights are validated, then written into a row nobody reads, then published: a reader never sees a torn adapter and a
  refused one changes nothing.
* One writer at a time, so an id is loaded once however many threads ask for it; running requests never wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from dnd_sdk.engine.slot_table import SlotTable
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, ConfigError, LayoutMismatchError
from dnd_sdk.lora import LoraLayout, Segment

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
        self._table = SlotTable(n_slots, wait_s)
        try:
            with torch.inference_mode(False):  # an inference tensor could not be written to later
                self._arena = torch.zeros(self.n_slots + 1, layout.n_parameters, device=device, dtype=dtype)
        except (RuntimeError, MemoryError) as e:  # torch has no error of its own for a CPU without memory
            raise ConfigError(f"{self.n_slots} slots do not fit the memory of {device}", fix="lower n_slots") from e
        self.tables = _tables(layout, self._arena)
        """Module name -> (A `(S+1, r, in)`, B `(S+1, out, r)`), for `use_lora`."""
        self._writing = threading.RLock()
        self._staging: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}

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
    def lease(self, adapter_ids: Sequence[str | None]) -> Iterator[Tensor | int]:
        """Keep these adapters in place inside the block; yields the row index per batch row for `use_lora`.

        None is the base. Yields an int when all rows use one adapter (0: all base), else a long tensor `(B,)`.
        Raises `AdapterNotFoundError` for an id that is neither resident nor can be fetched, `BankFullError` when the
        adapters do not fit beside the pinned ones.
        """
        distinct = list(dict.fromkeys(i for i in adapter_ids if i is not None))
        rows = self._table.lease(distinct)
        if rows is None:
            rows = self._lease_missing(distinct)
        try:
            picked = [0 if i is None else rows[i] for i in adapter_ids]
            yield picked[0] if len(set(picked)) == 1 else torch.tensor(picked, device=self._arena.device)
        finally:
            self._table.release(distinct)

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
                    self._bring_in(adapter_id, self._fetch and partial(self._fetch, adapter_id))
                    held |= self._table.lease([adapter_id]) or {}
            except BaseException:
                self._table.release(held)
                raise
        return held

    def _bring_in(self, adapter_id: str, loader: Loader | None) -> None:
        # the caller holds `_writing`
        if self._table.touch(adapter_id):
            return
        if loader is None:
            raise AdapterNotFoundError(
                f"adapter {adapter_id!r} is not in a slot", fix="load it (again), or pin it so that it stays"
            )
        staged = self._stage(adapter_id, loader())
        row = self._table.take_row()
        try:
            self._arena[row].copy_(staged, non_blocking=True)
            if self._arena.is_cuda:  # the staging buffer is used again by the next load
                torch.cuda.current_stream(self._arena.device).synchronize()
        except BaseException:
            self._table.give_back(row)
            raise
        self._table.publish(adapter_id, row)

    def _stage(self, adapter_id: str, flat: Tensor) -> Tensor:
        """The checked vector in the arena's memory order, on its own device (pinned host memory beside CUDA)."""
        if flat.dim() != 1:
            raise LayoutMismatchError(f"adapter {adapter_id!r}: expected a flat vector, got shape {tuple(flat.shape)}")
        self.layout.check_size(flat.numel())
        flat = flat.detach()
        staged, staged_B = self._buffer(flat.device)
        staged.copy_(flat)
        pieces = [piece for segment, piece in self.layout.views(flat) if segment.part == "lora_B"]
        for piece, B in zip(pieces, staged_B, strict=True):
            torch.mul(piece, self.layout.scaling, out=B)
        self._check_finite(adapter_id, staged)
        return staged

    def _buffer(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """A float32 vector in the arena's memory order, and its B matrices."""
        if device not in self._staging:
            pinned = device.type == "cpu" and self._arena.is_cuda
            with torch.inference_mode(False):
                staged = torch.empty(self.layout.n_parameters, device=device, pin_memory=pinned)
            self._staging[device] = staged, [B for _, B in _tables(self.layout, staged).values()]
        return self._staging[device]

    def _check_finite(self, adapter_id: str, staged: Tensor) -> None:
        limit = torch.finfo(self._arena.dtype).max
        low, high = (v.item() for v in torch.aminmax(staged))
        if -limit <= low and high <= limit:  # False for NaN too
            return
        broken = next(s for s in self.layout.segments if not _within(staged[s.start : s.stop], limit))
        raise AdapterCorruptError(
            f"adapter {adapter_id!r}: {_describe(broken)} has values that are not finite in {self._arena.dtype}",
            fix="make or fetch the adapter again",
        )


def _tables(layout: LoraLayout, stacked: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (A `(..., r, in)`, B `(..., out, r)`) as views of `(..., P)` that holds each B transposed."""
    out = {}
    for a, b in zip(layout.segments[::2], layout.segments[1::2], strict=True):
        lead = stacked.shape[:-1]
        A = stacked[..., a.start : a.stop].view(*lead, *a.shape)
        out[a.module] = (A, stacked[..., b.start : b.stop].view(*lead, *b.shape[::-1]).transpose(-1, -2))
    return out


def _within(values: Tensor, limit: float) -> bool:
    return bool((values.abs() <= limit).all())


def _describe(segment: Segment) -> str:
    return f"tensor {segment.peft_key} {segment.shape}"
