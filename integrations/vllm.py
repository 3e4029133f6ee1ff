"""A resolver for vLLM: a server with this package installed finds adapters in the home's store, by name.

vLLM calls `register`, the entry point `dnd` of `vllm.general_plugins`, in each of its processes; `DND_HOME` says which
home. A request may name an adapter as the store does, or `dnd-<first 16 of its id>`. Nothing of vLLM is imported before
it calls.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, NamedTuple

from dnd_sdk.adapters import Adapter, AdapterStore, find_served, served_folder
from dnd_sdk.config import Home
from dnd_sdk.errors import DndError
from dnd_sdk.models import EMBEDDED

log = logging.getLogger(__name__)

NAME = "dnd"
_POSITIVE = 2**63 - 1


class Resolved(NamedTuple):
    """An adapter as vLLM takes it."""

    int_id: int
    """Of its content: the same in every process, at least 1, less than 2**63."""
    path: Path
    """A folder whose content never changes."""


def register() -> None:
    """Have vLLM ask the store of `DND_HOME` for names that it does not know; harmless when it is called again."""
    try:
        from vllm.lora.resolver import LoRAResolverRegistry
    except ImportError as e:
        log.warning("this vLLM has no resolvers, adapters have to be loaded by name: %s", e)
        return
    LoRAResolverRegistry.register_resolver(NAME, make_resolver(Home.find()))


def make_resolver(home: Home) -> Any:
    """A `LoRAResolver` over the store of this home."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class StoreResolver(LoRAResolver):  # type: ignore[misc]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            found = await asyncio.to_thread(resolve, home, base_model_name, lora_name)
            if found is None:
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=found.int_id, lora_path=str(found.path))

    return StoreResolver()


def resolve(home: Home, base_model_name: str, name: str) -> Resolved | None:
    """The stored adapter of that name, in a folder of its content; None: there is none, or it cannot be served.

    `base_model_name` is the folder or hub id of the server's base: where that is named as an embedded base, adapters of
    other weights are not given out. Whatever is wrong with an adapter is logged.
    """
    store = AdapterStore(home)
    try:
        adapter = find_served(store, name)
        if adapter is None or _is_of_another_base(adapter, base_model_name):
            return None
        return Resolved(int_id_of(adapter), served_folder(adapter, home.served.absolute()))
    except DndError as e:
        log.warning("adapter %r is not served: %s", name[:80], e)
        return None


def int_id_of(adapter: Adapter) -> int:
    """A positive number below 2**63 that stands for its weights."""
    return int(adapter.id[:16], 16) & _POSITIVE or 1


def _is_of_another_base(adapter: Adapter, base_model_name: str) -> bool:
    base = EMBEDDED.get(Path(base_model_name).name)
    differs = base is not None and base.kind == "base" and base.fingerprint != adapter.base_fingerprint
    if differs:
        log.warning("adapter %r was made for another base than %s", adapter.name, base_model_name)
    return differs
