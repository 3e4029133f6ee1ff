"""Which base a stored adapter was made for, by name: adapters of several bases share a home and never meet.

An adapter knows its base by fingerprint. Of an embedded base that gives the name; any other is called what the
adapter's PEFT config calls it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from dnd_sdk.adapters import base_name_in, check_base, check_free
from dnd_sdk.errors import AdapterNotFoundError
from dnd_sdk.models import EMBEDDED, embedded_base

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dnd_sdk.adapters import Adapter, AdapterStore
    from dnd_sdk.models import Base, BaseCard


def base_name_of(adapter: Adapter) -> str | None:
    """The name of the base it was made for; None: nothing says it."""
    return embedded_base(adapter.base_fingerprint) or base_name_in(adapter.path)


def of_base(adapters: Iterable[Adapter], base_name: str) -> list[Adapter]:
    """Those made for the base of that name, also where they call the same weights otherwise."""
    named = [(a, base_name_of(a)) for a in adapters]
    fingerprints = {a.base_fingerprint for a, name in named if name == base_name}
    return [a for a, _ in named if a.base_fingerprint in fingerprints]


def stored_for(store: AdapterStore, base: Base | BaseCard) -> list[Adapter]:
    """The stored adapters that were made for this base, by name."""
    return [a for a in store.ls() if a.base_fingerprint == base.fingerprint]


def check_made_for(adapter: Adapter, base: Base | BaseCard) -> None:
    """Raise `LayoutMismatchError`, naming the adapter's base, unless it was made for this one."""
    check_base(adapter, base.fingerprint, embedded_base(adapter.base_fingerprint))


def check_known_base(adapter: Adapter, base_name: str) -> None:
    """`check_made_for` before any base is loaded: of an adapter of one embedded base and the name of another."""
    own = embedded_base(adapter.base_fingerprint)
    if own is not None and base_name in EMBEDDED and own != base_name:
        check_base(adapter, EMBEDDED[base_name].fingerprint, own)


def check_name_free(store: AdapterStore, name: str, base: Base | BaseCard) -> None:
    """Raise `ConfigError`, naming that base, if an adapter of another base has this name."""
    try:
        stored = store.get(name)
    except AdapterNotFoundError:
        return
    if stored.name == name:  # not found by its id
        check_free(stored, base.fingerprint, embedded_base(stored.base_fingerprint))


def made_elsewhere(store: AdapterStore, base: Base | BaseCard) -> str | None:
    """How to use what a home has for other embedded bases, in words, where it has no adapter for this one; else None.

    Whoever changes the base, or upgrades to a release with another default, would else look for them in vain.
    """
    stored = [a for a in store.changes(0).adapters.values() if a is not None]
    if any(a.base_fingerprint == base.fingerprint for a in stored):
        return None
    counts = Counter(name for a in stored if (name := embedded_base(a.base_fingerprint)))
    told = (_told(n, name) for name, n in sorted(counts.items()))
    return f"this home has {'; '.join(told)}" if counts else None


def _told(n: int, base_name: str) -> str:
    many, them = ("adapters", "them") if n > 1 else ("adapter", "it")
    return f"{n} {many} for {base_name}: --base {base_name} uses {them}"
