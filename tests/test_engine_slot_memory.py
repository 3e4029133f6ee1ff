"""Memory of slots, as references on the host and as an arena on a device: the same contents by either way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_parts import strong, tiny_base, tiny_layout

from dnd_sdk.engine.slot_memory import DeviceSlots, HostSlots, SlotMemory, slot_memory
from dnd_sdk.errors import ConfigError
from dnd_sdk.lora import Packing

LAYOUT = tiny_layout(tiny_base())
PACKING = Packing(LAYOUT)
A, B = (strong(LAYOUT, seed) for seed in (1, 2))

Make = Callable[[int], SlotMemory]


def on_host(n_slots: int) -> SlotMemory:
    return HostSlots(PACKING, n_slots, torch.float32)


def on_device(n_slots: int) -> SlotMemory:
    return DeviceSlots(PACKING, n_slots, torch.device("cpu"), torch.float32)  # nothing in it knows which device


EITHER = pytest.mark.parametrize("make", [on_host, on_device])


def plain(flat: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(flat, torch.nan)
    PACKING.pack(flat, out)
    return out


def test_the_device_decides() -> None:
    assert isinstance(slot_memory(PACKING, 1, torch.device("cpu"), torch.float32), HostSlots)
    assert isinstance(slot_memory(PACKING, 1, torch.device("meta"), torch.float32), DeviceSlots)


@EITHER
def test_rows_are_filled_emptied_and_filled_again(make: Make) -> None:
    memory = make(2)
    assert not memory[0].values.any()
    memory.put(1, memory.pack(A))
    memory.put(2, memory.pack(B))
    kept = memory.take(1)
    assert torch.equal(kept.values, plain(A))
    memory.put(1, memory.take(2))
    memory.put(2, kept)
    assert torch.equal(memory[1].values, plain(B)) and torch.equal(memory[2].values, plain(A))
    assert not memory[0].values.any()


@EITHER
def test_what_was_taken_out_is_its_own_until_it_is_given_away(make: Make) -> None:
    memory = make(1)
    memory.put(1, memory.pack(A))
    kept = memory.take(1)
    for flat in (B, A, B):
        memory.put(1, memory.pack(flat))
        memory.free(1)
    memory.put(1, memory.pack(B))
    assert torch.equal(kept.values, plain(A)) and torch.equal(memory[1].values, plain(B))
    memory.reuse(kept)
    assert torch.equal(memory.pack(B).values, plain(B))


@EITHER
def test_what_is_packed_in_inference_mode_can_be_written_later(make: Make) -> None:
    with torch.inference_mode():
        memory = make(1)
        memory.put(1, memory.pack(A))
        kept = memory.take(1)
    memory.reuse(kept)
    memory.put(1, memory.pack(B))
    assert torch.equal(memory[1].values, plain(B))


@EITHER
def test_a_row_on_a_device_stays_where_it_is_and_its_matrices_are_found_once(make: Make) -> None:
    memory = make(1)
    memory.put(1, memory.pack(A))
    where, views = memory[1].values.data_ptr(), memory[1].views
    kept = memory.take(1)
    memory.put(1, memory.pack(B))
    assert (memory[1].values.data_ptr() == where) == isinstance(memory, DeviceSlots)
    memory.put(1, kept)
    assert memory[1].values.data_ptr() == where and memory[1].views is views
    assert torch.equal(memory[1].views[0].A, PACKING.views(plain(A))[0].A)


def test_a_swap_on_the_host_copies_nothing() -> None:
    memory = on_host(1)
    packed = memory.pack(A)
    memory.put(1, packed)
    assert memory[1] is packed and memory.take(1) is packed


def test_the_host_packs_into_the_spare_vector_and_can_be_told_to_let_it_go() -> None:
    memory = on_host(2)
    memory.put(1, memory.pack(A))
    packed = memory[1]
    memory.free(1)
    assert memory.pack(B) is packed
    memory.reuse(packed)
    memory.release()
    assert memory.pack(B) is not packed


@EITHER
def test_too_many_slots_are_a_config_error(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"slots do not fit the memory of cpu"):
        make(1 << 40)
