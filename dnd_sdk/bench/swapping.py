"""How long it takes to have an adapter in a slot, by where it comes from, beside peft's swap from there.

* kept: it has been in a slot and lost it; the bank still has it in host memory. peft has its state in host memory.
* device, host: its flat vector lies there and was in no slot yet: checked and packed on its way.
* disk: the store finds it by its id, reads and checks it before that.
* Each is into a bank of one slot, so that whoever is in there goes into host memory when a kept one comes.
* What is registered lies as folders in the store: one adapter of the base's layout, the others small ones of another.
* The files were read before, so that disk is the page cache: what is compared is the work, not the drive.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from dnd_sdk.adapters import Adapter, AdapterStore
from dnd_sdk.bench.rivals import Peft, state_of
from dnd_sdk.bench.timing import Timed, in_turn, ratio
from dnd_sdk.bench.workload import Workload
from dnd_sdk.config import Home
from dnd_sdk.engine import SlotBank
from dnd_sdk.lora import LoraLayout

_RIVAL = "swapped"


def time_swaps(work: Workload, storing: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """By source: milliseconds of a swap with one and with `sizes.registered` adapters in the store, and peft's.

    `storing` is told how many adapters of how many are stored.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="dnd-bench-")))
        flat = work.weights()
        stores = [_Registered(work, flat, folder / str(n), n, storing) for n in (1, work.sizes.registered)]
        rival = Peft(work.engine.base, work.engine.layout, {_RIVAL: flat})
        return {source: _compared(work, source, stores, rival, flat) for source in _sources(work)}


def _sources(work: Workload) -> tuple[str, ...]:
    return ("kept", "host", "disk") if work.device.type == "cpu" else ("kept", "device", "host", "disk")


def _compared(work: Workload, source: str, stores: list[_Registered], rival: Peft, flat: Tensor) -> dict[str, Any]:
    calls = [(partial(s.swap, source), partial(s.free, source)) for s in stores]
    for stored in stores:  # what the source before this one left is gone then
        stored.swap("host")
        stored.free(source)
    *ours, peft = in_turn(
        *calls, _hotswap(work, source, rival, flat, stores[0]), repeats=work.sizes.swap_rounds, clock=work.clock
    )
    return {
        "registered": [
            {"n": s.n, "ms": 1e3 * statistics.median(t), "over_one": ratio(t, ours[0])}
            for s, t in zip(stores, ours, strict=True)
        ],
        "peft_ms": 1e3 * statistics.median(peft),
        "peft_over_ours": ratio(peft, ours[-1]),
    }


def _hotswap(work: Workload, source: str, rival: Peft, flat: Tensor, stored: _Registered) -> Timed:
    if source == "disk":
        folder = stored.adapter.path

        def swap() -> None:
            rival.hotswap_folder(_RIVAL, folder)
            work.synchronize()
    else:
        where = flat.to(work.device, work.engine.base.model.dtype) if source == "device" else flat
        state = state_of(work.engine.layout, where, _RIVAL)

        def swap() -> None:
            rival.hotswap(_RIVAL, state)
            work.synchronize()

    return swap, lambda: None


class _Registered:
    """A store of `n` adapters, of which one is swapped in again and again."""

    def __init__(
        self, work: Workload, flat: Tensor, root: Path, n: int, storing: Callable[[int, int], None] | None
    ) -> None:
        self.n, self._work, self._flat = n, work, flat
        engine = work.engine
        self._on_device = flat.to(work.device)
        store = self._store = AdapterStore(Home(root))
        of_base = {"base_fingerprint": engine.base.fingerprint}
        self.bank = SlotBank(
            engine.layout,
            1,
            work.device,
            engine.bank.packed(0).dtype,
            fetch=partial(store.load_by_id, layout=engine.layout, **of_base),
            is_stored=partial(store.has_id, **of_base),
            kept_bytes=2 * engine.bank.packed(0).nbytes,
        )
        self.adapter: Adapter = self._put("swapped", flat, engine.layout, engine.base.fingerprint)
        small = LoraLayout.from_model(nn.ModuleDict({"q_proj": nn.Linear(8, 8)}), r=1, target_modules=["q_proj"])
        for i in range(1, n):
            self._put(f"other-{i}", torch.full((small.n_parameters,), float(i)), small, "0" * 64)
            if storing is not None:
                storing(i + 1, n)

    def swap(self, source: str) -> None:
        """Have the adapter in its slot, and wait for it."""
        if source in ("device", "host"):
            self.bank.load(self.adapter.id, self._on_device if source == "device" else self._flat)
        with self.bank.lease([self.adapter.id]) as row:
            assert isinstance(row, int)
            self.bank.views(row)
        self._work.synchronize()

    def free(self, source: str) -> None:
        """Have it where it came from only; raises where it was not in its slot, for then nothing was swapped."""
        if self.bank.resident() != [self.adapter.id]:
            raise RuntimeError("the adapter was not in a slot after its swap")
        if source == "kept":
            self.bank.load("other", self._flat)
        else:
            self.bank.evict(self.adapter.id)

    def _put(self, name: str, flat: Tensor, layout: LoraLayout, base_fingerprint: str) -> Adapter:
        return self._store.put(
            flat, layout, name=name, base_name="bench", base_fingerprint=base_fingerprint, source="generated"
        )
