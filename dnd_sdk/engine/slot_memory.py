"""Where the packed vectors of a bank's slots lie, by row; row 0 is zeros: the base.

* On the host a slot is a reference: a vector comes into it and leaves it without a copy.
* On a device every slot is a place of one arena, written by one copy and read back by one.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dnd_sdk.errors import ConfigError
from dnd_sdk.lora import GroupViews, Packing


class Packed:
    """One packed vector `(P,)`; its matrices are found once, which takes longer than to bring it into a slot."""

    def __init__(self, packing: Packing, values: Tensor) -> None:
        self._packing, self.values = packing, values

    @cached_property
    def views(self) -> tuple[GroupViews, ...]:
        """Its matrices."""
        return self._packing.views(self.values)


class SlotMemory(Protocol):
    """One writer at a time; a row that is not being written may be read meanwhile."""

    def __getitem__(self, row: int) -> Packed:
        """What is in a row."""

    def pack(self, flat: Tensor) -> Packed:
        """The flat vector `(P,)` as `put` takes it."""

    def put(self, row: int, packed: Packed) -> None:
        """Fill an empty row."""

    def take(self, row: int) -> Packed:
        """Empty a row; what was in it, in host memory, as `put` takes it."""

    def free(self, row: int) -> None:
        """Empty a row whose vector nobody wants."""

    def reuse(self, packed: Packed) -> None:
        """Have a vector for the next `pack` that nobody wants any more."""

    def release(self) -> None:
        """Hold no memory but that of the rows."""


class HostSlots:
    """Slots in host memory: a row is the vector that was put there."""

    def __init__(self, packing: Packing, n_slots: int, dtype: torch.dtype) -> None:
        """Raises `ConfigError` when so many slots cannot be had."""
        self._packing, self._dtype = packing, dtype
        _arena(n_slots + 1, packing, "cpu", dtype)  # asked for and given back: too many slots are said now
        self._rows = {0: Packed(packing, _empty(packing, dtype).zero_())}
        self._spare: Packed | None = None

    def __getitem__(self, row: int) -> Packed:
        """What is in a row."""
        return self._rows[row]

    def pack(self, flat: Tensor) -> Packed:
        """Pack into the spare vector: memory that is new to the process takes several times as long to write."""
        spare, self._spare = self._spare, None
        packed = spare or Packed(self._packing, _empty(self._packing, self._dtype))
        self._packing.pack(flat.cpu(), packed.values)
        return packed

    def put(self, row: int, packed: Packed) -> None:
        """Refer to the vector."""
        self._rows[row] = packed

    def take(self, row: int) -> Packed:
        """Refer to it no more."""
        return self._rows.pop(row)

    def free(self, row: int) -> None:
        """The vector becomes the spare one."""
        self.reuse(self._rows.pop(row))

    def reuse(self, packed: Packed) -> None:
        """There is one spare vector at most."""
        self._spare = packed

    def release(self) -> None:
        """No spare vector."""
        self._spare = None


class DeviceSlots:
    """Slots of one arena `(S+1, P)`, which stays where it is."""

    def __init__(self, packing: Packing, n_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        """Raises `ConfigError` when so many slots do not fit the device."""
        self._packing = packing
        self._rows = [Packed(packing, row) for row in _arena(n_slots + 1, packing, device, dtype).zero_()]

    def __getitem__(self, row: int) -> Packed:
        """What is in a row."""
        return self._rows[row]

    def pack(self, flat: Tensor) -> Packed:
        """Pack where the vector is, so that what crosses to the device is one copy."""
        zero = self[0].values
        values = torch.empty_like(zero) if flat.device == zero.device else self._host()
        self._packing.pack(flat.to(values.device), values)
        return Packed(self._packing, values)

    def put(self, row: int, packed: Packed) -> None:
        """One copy into the arena."""
        target = self[row].values
        target.copy_(packed.values, non_blocking=True)
        if target.is_cuda:  # whoever reads it may do so on another stream
            torch.cuda.current_stream(target.device).synchronize()

    def take(self, row: int) -> Packed:
        """One copy out of it."""
        return Packed(self._packing, self._host().copy_(self[row].values))

    def free(self, row: int) -> None:
        """Nothing to do: the memory is the arena's."""

    def reuse(self, packed: Packed) -> None:
        """Nothing to do: torch has page-locked memory that was let go for the next who asks."""

    def release(self) -> None:
        """Nothing to do."""

    def _host(self) -> Tensor:
        zero = self[0].values
        return _empty(self._packing, zero.dtype, pinned=zero.is_cuda)


def slot_memory(packing: Packing, n_slots: int, device: torch.device, dtype: torch.dtype) -> SlotMemory:
    """Memory for `n_slots` adapters on a device; raises `ConfigError` when it has not enough."""
    if device.type == "cpu":
        return HostSlots(packing, n_slots, dtype)
    return DeviceSlots(packing, n_slots, device, dtype)


def _empty(packing: Packing, dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be written to later
        return torch.empty(packing.layout.n_parameters, dtype=dtype, pin_memory=pinned)


def _arena(n_rows: int, packing: Packing, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Memory for `n_rows` vectors, `(n_rows, P)`; nothing is in it, so that on the host it is only asked for."""
    try:
        with torch.inference_mode(False):
            return torch.empty(n_rows, packing.layout.n_parameters, device=device, dtype=dtype)
    except (RuntimeError, MemoryError) as e:  # torch has no error of its own for a CPU without memory
        raise ConfigError(f"{n_rows - 1} slots do not fit the memory of {device}", fix="lower n_slots") from e
