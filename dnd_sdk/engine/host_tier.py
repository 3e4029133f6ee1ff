"""Adapters that lost their slot, packed and checked in host memory: to bring one back nothing is read or computed."""

from __future__ import annotations

from collections import OrderedDict

from dnd_sdk.engine.slot_memory import Packed


class HostTier:
    """Packed vectors by adapter id, bounded by bytes: those that were kept the longest ago go first; not thread-safe.

    None of them is in a slot: when one comes into it, it leaves here.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._n_bytes = max_bytes, 0
        self._kept: OrderedDict[str, Packed] = OrderedDict()

    @property
    def n_bytes(self) -> int:
        """What the kept vectors take."""
        return self._n_bytes

    def ids(self) -> list[str]:
        """The adapters, in the order in which they will go."""
        return list(self._kept)

    def get(self, adapter_id: str) -> Packed | None:
        """The adapter's vector; None: it is not kept."""
        return self._kept.get(adapter_id)

    def keep(self, adapter_id: str, packed: Packed) -> list[Packed]:
        """Keep an adapter's vector, which was not kept; returns what went for it, or itself where it is too large."""
        if packed.values.nbytes > self._max_bytes:
            return [packed]
        gone = []
        while self._n_bytes + packed.values.nbytes > self._max_bytes:
            gone.append(self._drop(next(iter(self._kept))))
        self._kept[adapter_id] = packed
        self._n_bytes += packed.values.nbytes
        return gone

    def drop(self, adapter_id: str) -> Packed | None:
        """Keep this adapter no longer; its vector, if it was kept."""
        return self._drop(adapter_id) if adapter_id in self._kept else None

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()
        self._n_bytes = 0

    def _drop(self, adapter_id: str) -> Packed:
        packed = self._kept.pop(adapter_id)
        self._n_bytes -= packed.values.nbytes
        return packed
