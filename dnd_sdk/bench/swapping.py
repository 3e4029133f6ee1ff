"""How long it takes to have an adapter in a slot: from the device's memory, the host's, and disk, beside peft's swap.

* A swap is `bank.load` of an adapter that is in no slot; from disk, the store reads and checks it by its id first.
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
    return ("host", "disk") if work.device.type == "cpu" else ("device", "host", "disk")


def _compared(work: Workload, source: str, stores: list[_Registered], rival: Peft, flat: Tensor) -> dict[str, Any]:
    calls = [(partial(s.swap, source), s.free) for s in stores]
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
        self._on_device = flat.to(work.device)
        self._store = AdapterStore(Home(root))
        self.adapter: Adapter = self._put("swapped", flat, work.engine.layout, work.engine.base.fingerprint)
        small = LoraLayout.from_model(nn.ModuleDict({"q_proj": nn.Linear(8, 8)}), r=1, target_modules=["q_proj"])
        for i in range(1, n):
            self._put(f"other-{i}", torch.full((small.n_parameters,), float(i)), small, "0" * 64)
            if storing is not None:
                storing(i + 1, n)

    def swap(self, source: str) -> None:
        """Have the adapter in a slot, and wait for it."""
        bank, adapter_id = self._work.engine.bank, self.adapter.id
        if source == "disk":
            bank.ensure(adapter_id, self._read)
        else:
            bank.load(adapter_id, self._on_device if source == "device" else self._flat)
        self._work.synchronize()

    def free(self) -> None:
        """Take it out again; raises where it was not in a slot, for then nothing was swapped."""
        if not self._work.engine.bank.evict(self.adapter.id):
            raise RuntimeError("the adapter was not in a slot after its swap")

    def _read(self) -> Tensor:
        base = self._work.engine.base
        return self._store.load_by_id(self.adapter.id, self._work.engine.layout, base_fingerprint=base.fingerprint)

    def _put(self, name: str, flat: Tensor, layout: LoraLayout, base_fingerprint: str) -> Adapter:
        return self._store.put(
            flat, layout, name=name, base_name="bench", base_fingerprint=base_fingerprint, source="generated"
        )
