"""Slot bank: what lies in the rows, who may be evicted, and that a refused adapter changes nothing."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from engine_parts import strong, tiny_base, tiny_layout
from helpers import SAME_MATHS

from dnd_sdk.engine import SlotBank
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, BankFullError, ConfigError, LayoutMismatchError
from dnd_sdk.lora.linear import tables_from_flat

LAYOUT = tiny_layout(tiny_base())
A, B, C = (strong(LAYOUT, seed) for seed in (1, 2, 3))


def make(n_slots: int = 2, **settings: float) -> SlotBank:
    return SlotBank(LAYOUT, n_slots, wait_s=settings.get("wait_s", 0.05))


def fetching(n_slots: int, **known: torch.Tensor) -> tuple[SlotBank, list[str]]:
    """A bank that fetches what is `known`; the list tells what it asked for."""
    asked: list[str] = []

    def fetch(adapter_id: str) -> torch.Tensor:
        asked.append(adapter_id)
        if adapter_id not in known:
            raise AdapterNotFoundError(f"no {adapter_id!r}")
        return known[adapter_id]

    return SlotBank(LAYOUT, n_slots, fetch=fetch, wait_s=0.05), asked


def rows_of(bank: SlotBank, ids: list[str | None]) -> tuple[int, ...] | int:
    with bank.lease(ids) as rows:
        return rows


def test_tables_hold_the_adapter_with_its_scaling() -> None:
    bank = make()
    bank.load("a", A)
    row = rows_of(bank, ["a"])
    for name, (want_A, want_B) in tables_from_flat(LAYOUT, A[None]).items():
        assert torch.equal(bank.tables[name][0][row], want_A[0])
        torch.testing.assert_close(bank.tables[name][1][row], want_B[0], **SAME_MATHS)


def test_tables_are_views_of_one_arena_and_row_zero_stays_zero() -> None:
    bank = make()
    bank.load("a", A)
    storages = {t.untyped_storage().data_ptr() for pair in bank.tables.values() for t in pair}
    assert len(storages) == 1
    assert not any(t[0].any() for pair in bank.tables.values() for t in pair)


def test_bfloat16_bank_rounds_the_scaled_values_once() -> None:
    bank = SlotBank(LAYOUT, 1, dtype=torch.bfloat16)
    bank.load("a", A)
    segment, values = list(LAYOUT.views(A))[1]
    assert torch.equal(bank.tables[segment.module][1][1], (values * LAYOUT.scaling).bfloat16())


def test_lease_gives_an_int_when_uniform_and_one_per_row_when_mixed() -> None:
    bank = make()
    bank.load("a", A)
    bank.load("b", B)
    assert rows_of(bank, [None, None]) == 0
    row_a, row_b = rows_of(bank, ["a", "a"]), rows_of(bank, ["b"])
    assert {row_a, row_b} == {1, 2}
    assert rows_of(bank, ["b", None, "a"]) == (row_b, 0, row_a)


def test_least_recently_used_is_evicted() -> None:
    bank = make()
    bank.load("a", A)
    bank.load("b", B)
    rows_of(bank, ["a"])
    bank.load("c", C)
    assert bank.resident() == ["a", "c"]


def test_a_resident_id_is_not_written_again() -> None:
    bank = make()
    bank.load("a", A)
    bank.load("a", B)
    segment, values = next(LAYOUT.views(A))
    assert torch.equal(bank.tables[segment.module][0][rows_of(bank, ["a"])], values)


def test_lease_keeps_a_slot_and_its_values() -> None:
    bank = make(1)
    bank.load("a", A)
    with bank.lease(["a", "a"]) as row:
        before = [t[row].clone() for pair in bank.tables.values() for t in pair]
        with pytest.raises(BankFullError, match="pinned or in use"):
            bank.load("b", B)
        with pytest.raises(BankFullError, match="running request"):
            bank.evict("a")
        after = [t[row] for pair in bank.tables.values() for t in pair]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    bank.load("b", B)
    assert bank.resident() == ["b"]


def test_a_lease_ends_with_an_error_in_its_block() -> None:
    bank = make(1)
    bank.load("a", A)
    with pytest.raises(RuntimeError, match="model broke"), bank.lease(["a"]):
        raise RuntimeError("model broke")
    assert bank.evict("a")


def test_pins_survive_and_leave_one_slot() -> None:
    bank = make()
    bank.load("a", A)
    bank.pin("a")
    for adapter_id, flat in (("b", B), ("c", C)):
        bank.load(adapter_id, flat)
    assert bank.resident() == ["a", "c"]
    with pytest.raises(BankFullError, match="one must stay free"):
        bank.pin("c")
    with pytest.raises(BankFullError, match="is pinned"):
        bank.evict("a")
    bank.unpin("a")
    bank.pin("c")
    assert bank.evict("a") and not bank.evict("a")


def test_unknown_ids_are_named() -> None:
    bank = make()
    with pytest.raises(AdapterNotFoundError, match="'nope' is not in a slot"), bank.lease([None, "nope"]):
        pass
    with pytest.raises(AdapterNotFoundError, match="'nope' is not resident"):
        bank.pin("nope")


def test_more_adapters_in_a_batch_than_slots() -> None:
    bank, _ = fetching(2, a=A, b=B, c=C)
    with pytest.raises(BankFullError, match="3 adapters"), bank.lease(["a", "b", "c"]):
        pass
    assert rows_of(bank, ["a", "b"])  # nothing stayed leased


def broken(where: int, value: float) -> torch.Tensor:
    flat = A.clone()
    flat[where] = value
    return flat


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_its_tensor(value: float) -> None:
    bank = make(1)
    bank.load("a", A)
    segment = LAYOUT.segments[5]
    before = bank._arena.clone()
    with pytest.raises(AdapterCorruptError, match=rf"{segment.module}\.{segment.part}"):
        bank.load("b", broken(segment.stop - 1, value))
    assert torch.equal(bank._arena, before) and bank.resident() == ["a"]


def test_a_value_too_large_for_the_banks_dtype_is_refused() -> None:
    bank = SlotBank(LAYOUT, 1, dtype=torch.float16)
    with pytest.raises(AdapterCorruptError, match=r"float16"):
        bank.load("a", broken(0, 70000.0))


@pytest.mark.parametrize("flat", [A[:-1], torch.cat([A, A[:1]]), A[None]])
def test_a_wrong_size_is_refused(flat: torch.Tensor) -> None:
    bank = make(1)
    bank.load("a", A)
    before = bank._arena.clone()
    with pytest.raises(LayoutMismatchError, match="flat"):
        bank.load("b", flat)
    assert torch.equal(bank._arena, before) and bank.resident() == ["a"]


def test_a_failed_write_leaves_the_slot_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make(1)

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(bank.packing, "pack", fail)
        with pytest.raises(MemoryError):
            bank.load("a", A)
    assert bank.resident() == []
    bank.load("a", A)
    assert bank.resident() == ["a"]


def test_an_adapter_that_lost_its_slot_is_fetched_by_its_id() -> None:
    bank, asked = fetching(1, a=A)
    bank.ensure("a", lambda: A)
    bank.load("b", B)
    with bank.lease(["a"]) as row:
        assert torch.equal(bank._arena[row], row_of(A))
    assert asked == ["a"]
    bank.load("a", B)  # is resident
    assert bank.evict("a") and not bank.evict("a") and asked == ["a"]
    for adapter_id in ("b", "c"):  # unknown to whoever fetches
        with pytest.raises(AdapterNotFoundError, match=f"no '{adapter_id}'"), bank.lease([adapter_id]):
            pass
    assert bank.resident() == []


def test_without_anybody_who_fetches_a_lost_adapter_is_to_be_brought_again() -> None:
    bank = make(1)
    bank.ensure("a", lambda: A)
    bank.load("b", B)
    with pytest.raises(AdapterNotFoundError, match="'a' is not in a slot"), bank.lease(["a"]):
        pass


def test_nothing_is_kept_of_adapters_that_lost_their_slot() -> None:
    bank, kept, names = make(2), list[weakref.ref[Any]](), [f"adapter-{i}" for i in range(20)]
    for name in names:

        def loader() -> torch.Tensor:
            return A

        kept.append(weakref.ref(loader))
        bank.ensure(name, loader)
        del loader
    gc.collect()
    assert not any(ref() for ref in kept) and bank.resident() == names[-2:]
    assert names[0] not in repr(vars(bank)) + repr(vars(bank._table)) and names[-1] in repr(vars(bank._table))


def row_of(flat: torch.Tensor) -> torch.Tensor:
    bank = make(1)
    bank.load("x", flat)
    return bank._arena[1]


def test_a_failing_loader_changes_nothing() -> None:
    bank = make(1)
    bank.load("a", A)

    def loader() -> torch.Tensor:
        raise OSError("disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        bank.ensure("b", loader)
    assert bank.resident() == ["a"]
    with pytest.raises(AdapterNotFoundError), bank.lease(["b"]):
        pass


def test_threads_asking_for_one_adapter_load_it_once() -> None:
    bank, calls, gate = make(2), [], threading.Event()

    def loader() -> torch.Tensor:
        calls.append(1)
        gate.wait(5)
        return A

    threads = [threading.Thread(target=bank.ensure, args=("a", loader)) for _ in range(6)]
    for t in threads:
        t.start()
    gate.set()
    for t in threads:
        t.join()
    assert len(calls) == 1


def test_a_load_waits_for_a_running_request() -> None:
    bank = make(1, wait_s=10)
    bank.load("a", A)
    leased, done = threading.Event(), threading.Event()

    def request() -> None:
        with bank.lease(["a"]):
            leased.set()
            done.wait(5)

    thread = threading.Thread(target=request)
    thread.start()
    leased.wait(5)
    threading.Timer(0.05, done.set).start()
    bank.load("b", B)
    thread.join()
    assert bank.resident() == ["b"] and done.is_set()


def test_a_bank_made_in_inference_mode_can_be_written_later() -> None:
    with torch.inference_mode():
        bank = make(2)
        bank.load("a", A)
    bank.load("b", B)
    assert bank.resident() == ["a", "b"]


def test_no_slots_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="n_slots must be 1 or more"):
        make(0)
