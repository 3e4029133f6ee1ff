"""The parts that a session is put together from, as one value for everything that works with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnd_sdk.adaptation.bases import check_made_for

if TYPE_CHECKING:
    from dnd_sdk.adapters import Adapter, AdapterStore
    from dnd_sdk.config import Home
    from dnd_sdk.engine import Backend
    from dnd_sdk.generator import Generator
    from dnd_sdk.lora import LoraLayout
    from dnd_sdk.models import Base, BaseCard, Encoder
    from dnd_sdk.routing import DecisionLog, Router


@dataclass(frozen=True)
class Parts:
    """Parts that fit each other; `dnd_sdk.session.loading` makes and checks them."""

    base: Base | BaseCard
    """A card where the engine runs it elsewhere."""
    generator: Generator | None
    """None: adapters are reused, or the base answers."""
    encoder: Encoder
    store: AdapterStore
    router: Router
    engine: Backend
    home: Home
    log: DecisionLog

    @property
    def layout(self) -> LoraLayout:
        """The LoRA layout that every adapter has."""
        return self.engine.layout

    def make_resident(self, adapter: Adapter) -> None:
        """Have the engine hold an adapter made for this base; its weights are checked when read."""
        check_made_for(adapter, self.base)  # the same weights may be held as another's of this base
        self.engine.hold(adapter, lambda: self.store.load(adapter, self.layout, base_fingerprint=self.base.fingerprint))
