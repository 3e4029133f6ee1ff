"""The host tier: what it keeps, in which order it lets go, and that it never takes more than it may."""

from __future__ import annotations

import torch
from engine_parts import tiny_base, tiny_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_sdk.engine.host_tier import HostTier
from dnd_sdk.engine.slot_memory import Packed
from dnd_sdk.lora import Packing

PACKING = Packing(tiny_layout(tiny_base()))


def vector(n_bytes: int) -> Packed:
    return Packed(PACKING, torch.zeros(n_bytes, dtype=torch.uint8))


STEPS = st.lists(st.tuples(st.sampled_from("kkkgdc"), st.integers(0, 7), st.integers(0, 40)), max_size=40)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 100), STEPS)
def test_it_keeps_the_latest_that_fit(max_bytes: int, steps: list[tuple[str, int, int]]) -> None:
    tier, plain = HostTier(max_bytes), list[tuple[str, Packed]]()
    for step, number, n_bytes in steps:
        name, packed, known = str(number), vector(n_bytes), dict(plain).get(str(number))
        if step == "k" and known is None:
            after, gone = ([*plain, (name, packed)], []) if n_bytes <= max_bytes else (plain, [packed])
            while sum(p.values.nbytes for _, p in after) > max_bytes:
                gone.append(after.pop(0)[1])
            assert tier.keep(name, packed) == gone
            plain = after
        elif step == "g":
            assert tier.get(name) is known
        elif step == "d":
            assert tier.drop(name) is known
            plain = [(other, p) for other, p in plain if other != name]
        elif step == "c":
            tier.clear()
            plain = []
        assert tier.ids() == [other for other, _ in plain]
        assert tier.n_bytes == sum(p.values.nbytes for _, p in plain) <= max_bytes
