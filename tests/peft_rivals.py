"""Adapters swapped by name: by this package's engine and by plain peft."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_parts import peft_model, tiny_base, tiny_layout
from helpers import random_flat
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import Tensor

from dnd_sdk.bench.rivals import state_of as state_of
from dnd_sdk.engine import Engine

IDS = torch.randint(3, 260, (9, 7), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(engine: Engine, names: Sequence[str | None], ids: Tensor = IDS) -> Tensor:
    """Of a forward in which each row has its own adapter: the one place here that looks into the engine."""
    with engine.running(names):
        return engine.base.model(ids).logits.clone()


class Ours:
    """Adapters by name on a tiny engine, as a program would swap them."""

    def __init__(self, n_slots: int = 8) -> None:
        self.base = tiny_base()
        self.layout = tiny_layout(self.base)
        self.engine = Engine(self.base, self.layout, n_slots=n_slots)

    def load(self, name: str, flat: Tensor) -> None:
        self.engine.bank.load(name, flat)

    def swap(self, name: str, flat: Tensor) -> None:
        """Other weights under a name; a program that asks for them first does not lose the old ones if they are bad."""
        self.engine.bank.load(f"{name}, new", flat)
        self.engine.bank.evict(name)
        self.engine.bank.load(name, flat)
        self.engine.bank.evict(f"{name}, new")

    def logits(self, name: str | None, ids: Tensor = IDS) -> Tensor:
        return self.mixed([name] * len(ids), ids)

    def mixed(self, names: Sequence[str | None], ids: Tensor = IDS) -> Tensor:
        return logits(self.engine, names, ids)


class Peft:
    """The same by peft: `set_adapter` and its hot-swap from memory."""

    def __init__(self) -> None:
        self.base = tiny_base()
        self.layout = tiny_layout(self.base)
        self.config = LoraConfig(
            r=self.layout.r, lora_alpha=self.layout.lora_alpha, target_modules=list(self.layout.target_modules)
        )
        self.model: Any = None

    def load(self, name: str, flat: Tensor) -> None:
        if self.model is None:
            self.model = get_peft_model(copy.deepcopy(self.base.model), self.config, adapter_name=name).eval()
        else:
            self.model.add_adapter(name, self.config)
        own = dict(self.model.named_parameters())
        for key, values in state_of(self.layout, flat, name).items():
            own[key].data.copy_(values)

    def swap(self, name: str, flat: Tensor) -> None:
        hotswap_adapter_from_state_dict(self.model, state_of(self.layout, flat, name), name, self.config)

    @torch.no_grad()
    def logits(self, name: str | None, ids: Tensor = IDS) -> Tensor:
        assert name is not None
        self.model.set_adapter(name)
        return self.model(input_ids=ids).logits.clone()


def fresh(flat: Tensor, ids: Tensor = IDS) -> Tensor:
    """The logits of plain peft with these weights and no others."""
    base = tiny_base()
    with torch.no_grad():
        return peft_model(base, tiny_layout(base), flat)(input_ids=ids).logits


LAYOUT = tiny_layout(tiny_base())
A, B, C = (random_flat(LAYOUT, seed=seed) for seed in (1, 2, 3))
rivals = pytest.mark.parametrize(
    "rival", [Ours, pytest.param(Peft, marks=pytest.mark.xfail(strict=False, reason="as measured of peft 0.21.2"))]
)
