"""Slot bank: what lies in the rows, who may be evicted, and that a refused adapter changes nothing."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from engine_parts import strong, tiny_base, tiny_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_sdk.engine import SlotBank
from dnd_sdk.engine.slot_memory import DeviceSlots
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, BankFullError, ConfigError, LayoutMismatchError
from dnd_sdk.lora import Packing

LAYOUT = tiny_layout(tiny_base())
A, B, C = (strong(LAYOUT, seed) for seed in (1, 2, 3))


def row_of(flat: torch.Tensor) -> torch.Tensor:
    """What a row holds of this adapter, the plain way."""
    out = torch.empty_like(flat)
    Packing(LAYOUT).pack(flat, out)
    return out


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


def holds(bank: SlotBank, adapter_id: str, flat: torch.Tensor) -> bool:
    """Whether the adapter is, or can be brought, in a row that holds these weights."""
    with bank.lease([adapter_id]) as row:
        assert isinstance(row, int)
        return torch.equal(bank.packed(row), row_of(flat))


def rows_of(bank: SlotBank, ids: list[str | None]) -> tuple[int, ...] | int:
    with bank.lease(ids) as rows:
        return rows


def test_a_row_is_the_packed_adapter_and_row_zero_the_base() -> None:
    bank = make()
    bank.load("a", A)
    row = rows_of(bank, ["a"])
    assert isinstance(row, int) and torch.equal(bank.packed(row), row_of(A))
    assert not bank.packed(0).any() and bank.views(0) is None
    views = bank.views(row)
    assert views is not None and bank.views(row) is views, "found once"
    want = bank.packing.views(row_of(A))
    assert all(torch.equal(v.A, w.A) for v, w in zip(views, want, strict=True))
    assert all(torch.equal(x, y) for v, w in zip(views, want, strict=True) for x, y in zip(v.B, w.B, strict=True))


def test_bfloat16_bank_rounds_the_scaled_values_once() -> None:
    bank = SlotBank(LAYOUT, 1, dtype=torch.bfloat16)
    bank.load("a", A)
    assert torch.equal(bank.packed(1), row_of(A).bfloat16())


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
    assert holds(bank, "a", A)


def test_lease_keeps_a_slot_and_its_values() -> None:
    bank = make(1)
    bank.load("a", A)
    with bank.lease(["a", "a"]) as row:
        with pytest.raises(BankFullError, match="pinned or in use"):
            bank.load("b", B)
        with pytest.raises(BankFullError, match="running request"):
            bank.evict("a")
        assert isinstance(row, int) and torch.equal(bank.packed(row), row_of(A))
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
    with pytest.raises(AdapterCorruptError, match=rf"{segment.module}\.{segment.part}"):
        bank.load("b", broken(segment.stop - 1, value))
    assert bank.resident() == ["a"] and holds(bank, "a", A)


def test_a_value_too_large_for_the_banks_dtype_is_refused() -> None:
    bank = SlotBank(LAYOUT, 1, dtype=torch.float16)
    with pytest.raises(AdapterCorruptError, match=r"float16"):
        bank.load("a", broken(0, 70000.0))


@pytest.mark.parametrize("flat", [A[:-1], torch.cat([A, A[:1]]), A[None]])
def test_a_wrong_size_is_refused(flat: torch.Tensor) -> None:
    bank = make(1)
    bank.load("a", A)
    with pytest.raises(LayoutMismatchError, match="flat"):
        bank.load("b", flat)
    assert bank.resident() == ["a"] and holds(bank, "a", A)


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
    assert holds(bank, "a", A)
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


ROW_BYTES = A.nbytes


def keeping(n_slots: int, n_kept: int, **settings: Any) -> SlotBank:
    return SlotBank(LAYOUT, n_slots, kept_bytes=n_kept * ROW_BYTES, wait_s=0.05, **settings)


def never(*_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("it is kept")


def test_who_lost_the_slot_comes_back_without_being_fetched_or_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, want = keeping(1, 2), {"a": row_of(A), "b": row_of(B), "c": row_of(C)}
    for name, flat in (("a", A), ("b", B), ("c", C)):
        bank.load(name, flat)
    assert (bank.resident(), bank.kept()) == (["c"], ["a", "b"])
    monkeypatch.setattr(bank.packing, "pack", never)
    bank.ensure("a", never)
    assert (bank.resident(), bank.kept()) == (["a"], ["b", "c"])
    for name in "bcacb":
        with bank.lease([name]) as row:
            assert isinstance(row, int) and torch.equal(bank.packed(row), want[name])


def test_what_is_kept_is_bounded_and_the_longest_without_a_slot_goes() -> None:
    bank = keeping(1, 2)
    for i in range(5):
        bank.load(str(i), strong(LAYOUT, i))
    assert (bank.resident(), bank.kept()) == (["4"], ["2", "3"])
    assert keeping(1, 0).kept() == []


def test_evicted_adapters_are_not_kept() -> None:
    bank = keeping(1, 2)
    bank.load("a", A)
    bank.load("b", B)
    assert not bank.evict("a"), "it was in no slot"
    assert bank.evict("b") and bank.kept() == []
    bank.load("a", C)
    assert holds(bank, "a", C)


def test_clearing_frees_all_that_no_request_uses() -> None:
    bank, freed = keeping(2, 2), list[weakref.ref[torch.Tensor]]()
    for name, flat in (("a", A), ("b", B), ("c", C)):
        bank.load(name, flat)
        freed.append(weakref.ref(bank.packed(rows_of(bank, [name]))))  # type: ignore[arg-type]
    with bank.lease(["c"]):
        bank.clear()
        assert (bank.resident(), bank.kept()) == (["c"], []) and holds(bank, "c", C)
    bank.clear()
    gc.collect()
    assert bank.resident() == [] and not any(ref() is not None for ref in freed)


def test_an_adapter_that_is_no_longer_stored_is_not_brought_back() -> None:
    stored = {"a": A, "b": B, "c": C}

    def fetch(adapter_id: str) -> torch.Tensor:
        if adapter_id not in stored:
            raise AdapterNotFoundError(f"no {adapter_id!r}")
        return stored[adapter_id]

    bank = keeping(1, 3, fetch=fetch, is_stored=lambda adapter_id: adapter_id in stored)
    for name in "abc":
        assert holds(bank, name, stored[name])
    del stored["a"]
    for lease in (lambda: rows_of(bank, ["a"]), lambda: bank.try_lease("a"), lambda: bank.look_up("a")):
        with pytest.raises(AdapterNotFoundError, match="no 'a'"):
            lease()
    assert (bank.resident(), bank.kept()) == (["c"], ["b"]) and holds(bank, "b", B) and holds(bank, "c", C)
    del stored["b"]
    bank.ensure("b", lambda: A)  # whoever has it may bring it, and it is his
    assert holds(bank, "b", A)


def test_a_store_that_cannot_say_changes_nothing() -> None:
    def is_stored(adapter_id: str) -> bool:
        raise OSError("disk is gone")

    bank = keeping(1, 1, is_stored=is_stored)
    bank.load("a", A)
    bank.load("b", B)
    with pytest.raises(OSError, match="disk is gone"):
        bank.ensure("a", never)
    assert (bank.resident(), bank.kept()) == (["b"], ["a"]) and holds(bank, "b", B)


def test_what_is_kept_stays_kept_when_no_slot_is_free() -> None:
    bank = keeping(1, 1)
    bank.load("a", A)
    bank.load("b", B)
    with bank.lease(["b"]):
        for attempt in (lambda: bank.load("a", A), lambda: bank.load("c", C), lambda: rows_of(bank, ["a"])):
            with pytest.raises(BankFullError):
                attempt()
        assert bank.try_lease("a") is None
        assert (bank.resident(), bank.kept()) == (["b"], ["a"])
        assert holds(bank, "b", B)
    assert holds(bank, "a", A) and holds(bank, "b", B)


@pytest.mark.parametrize("bad", [broken(0, float("nan")), broken(-1, float("inf")), A[:-1]])
def test_a_refused_vector_takes_no_slot_and_nothing_that_is_kept(bad: torch.Tensor) -> None:
    bank = keeping(2, 2)
    for name, flat in (("a", A), ("b", B), ("c", C)):
        bank.load(name, flat)
    for _ in range(3):
        with pytest.raises((AdapterCorruptError, LayoutMismatchError)):
            bank.load("d", bad)
        assert (bank.resident(), bank.kept()) == (["b", "c"], ["a"])
    for name, flat in (("a", A), ("b", B), ("c", C)):
        assert holds(bank, name, flat)


def test_a_packing_that_fails_leaves_everybody_in_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = keeping(1, 1)
    bank.load("a", A)

    def fail(flat: torch.Tensor, out: torch.Tensor) -> None:
        out.fill_(torch.nan)
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(bank.packing, "pack", fail)
        with pytest.raises(MemoryError):
            bank.load("b", B)
    assert (bank.resident(), bank.kept()) == (["a"], []) and holds(bank, "a", A)
    bank.load("b", B)
    assert holds(bank, "b", B) and holds(bank, "a", A)


STEPS = st.lists(st.tuples(st.sampled_from("lllleufc"), st.integers(0, 6)), max_size=30)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 3), st.integers(0, 3), st.booleans(), STEPS)
def test_slots_and_what_is_kept_are_as_a_plain_list_says(
    n_slots: int, n_kept: int, arena: bool, steps: list[tuple[str, int]]
) -> None:
    bank = keeping(n_slots, n_kept)
    if arena:
        bank._memory = DeviceSlots(bank.packing, n_slots, torch.device("cpu"), torch.float32)
    resident, kept = list[str](), list[str]()
    for step, number in steps:
        name = str(number)
        if step == "l":
            bank.load(name, strong(LAYOUT, number))
            kept = [k for k in kept if k != name]
            if name not in resident and len(resident) == n_slots:
                kept.append(resident.pop(0))
            resident = [*(r for r in resident if r != name), name]
            kept = kept[max(0, len(kept) - n_kept) :]
        elif step == "e":
            assert bank.evict(name) == (name in resident)
            resident, kept = [r for r in resident if r != name], [k for k in kept if k != name]
        elif step == "u" and name in resident:
            assert holds(bank, name, strong(LAYOUT, number))
            resident = [*(r for r in resident if r != name), name]
        elif step == "f":
            with pytest.raises(AdapterCorruptError):
                bank.load("broken", broken(0, torch.nan))
        elif step == "c":
            bank.clear()
            resident, kept = [], []
        assert (bank.resident(), bank.kept()) == (resident, kept)
        for r in resident:
            slot = bank._table._slots[r].row
            assert torch.equal(bank.packed(slot), row_of(strong(LAYOUT, int(r))))
    for k in [*kept]:
        bank.ensure(k, never)
        assert holds(bank, k, strong(LAYOUT, int(k)))


def test_who_looks_an_adapter_up_waits_for_no_slot_and_finds_it_at_hand_later() -> None:
    bank, loads = keeping(1, 1, fetch=lambda name: A), list[str]()
    bank.load("b", B)

    def loader() -> torch.Tensor:
        loads.append("a")
        return A

    with bank.lease(["b"]):
        bank.look_up("a", loader)
        assert (bank.resident(), bank.kept(), loads) == (["b"], ["a"], ["a"])
        with pytest.raises(AdapterCorruptError):
            bank.look_up("c", lambda: broken(0, float("nan")))
    bank.ensure("a", loader)
    assert (bank.resident(), bank.kept(), loads) == (["a"], ["b"], ["a"]) and holds(bank, "a", A)
