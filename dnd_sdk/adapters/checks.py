"""What a stored adapter must satisfy: whole, of this base, its weights those its id was taken from."""

from __future__ import annotations

from pathlib import Path

from dnd_sdk.adapters.adapter import MANIFEST, Adapter, check_name, read_adapter, read_layout
from dnd_sdk.adapters.exemplars import read_exemplars
from dnd_sdk.adapters.peft_config import base_name_in
from dnd_sdk.adapters.peft_folder import adapter_id, read_weights
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, ConfigError, LayoutMismatchError
from dnd_sdk.files import FloatArray
from dnd_sdk.lora import LoraLayout


def check_folder(folder: Path) -> None:
    """Read everything a stored folder holds and hash its weights; raises what is wrong."""
    check_name(folder.name)
    adapter, layout = read_adapter(folder)
    _check_stored_hash(folder, adapter, layout)
    read_exemplars(folder, adapter.exemplars_sha256)


def check_base(adapter: Adapter, base_fingerprint: str | None, known_as: str | None = None) -> None:
    """Raise `LayoutMismatchError` unless the adapter was made for this base; None skips the comparison.

    `known_as` is the name of the base it was made for; None: the one in its config.
    """
    if base_fingerprint is not None and adapter.base_fingerprint != base_fingerprint:
        name = known_as or base_name_in(adapter.path)
        raise LayoutMismatchError(
            f"adapter {adapter.name!r} was made for another base model{f', {name}' if name else ''}: got fingerprint "
            f"{adapter.base_fingerprint[:16]}, expected {base_fingerprint[:16]}",
            fix=f"load the base it was made for{f', --base {name}' if name else ''}; or adapt again on this one",
        )


def check_free(stored: Adapter, base_fingerprint: str, known_as: str | None = None) -> None:
    """Raise `ConfigError` if a stored adapter has its name for another base; `known_as` as for `check_base`."""
    if stored.base_fingerprint != base_fingerprint:
        name = known_as or base_name_in(stored.path)
        raise ConfigError(
            f"an adapter named {stored.name!r} with another base{f', {name},' if name else ''} exists",
            fix=f"choose another --name{f', use that one with --base {name}' if name else ''} "
            f"or `dnd adapters rm {stored.name}`",
        )


def check_same(stored: Adapter, adapter: Adapter) -> None:
    """Raise `ConfigError` unless the stored adapter, of the same name, is the one that is to be stored."""
    check_free(stored, adapter.base_fingerprint)
    own = {"id": "other weights", "role": "another role"}
    differ = [own[k] for k in own if getattr(stored, k) != getattr(adapter, k)]
    if differ:
        raise ConfigError(
            f"an adapter named {adapter.name!r} with {differ[0]} exists",
            fix=f"choose another --name or `dnd adapters rm {adapter.name}`",
        )


def check_not_replaced(stored: Adapter, adapter: Adapter) -> None:
    """Raise `AdapterNotFoundError` if other weights are stored under the adapter's name by now."""
    if stored.id != adapter.id:
        raise AdapterNotFoundError(f"adapter {adapter.name!r} was replaced", fix="get it again by its name")


def check_read_hash(folder: Path, adapter: Adapter, flat: FloatArray, layout: LoraLayout) -> None:
    """`check_hash` of weights read from `folder` for `layout`, whatever layout they were stored with."""
    if adapter.layout_digest == layout.digest:
        check_hash(adapter, flat, layout)
    else:  # padded or folded: only as they were stored do they have the hash
        _check_stored_hash(folder, adapter, read_layout(folder))


def check_hash(adapter: Adapter, flat: FloatArray, layout: LoraLayout) -> None:
    """Raise `AdapterCorruptError` unless `flat` holds the weights that the adapter's id stands for."""
    found = adapter_id(flat, layout)
    if found != adapter.id:
        raise AdapterCorruptError(
            f"{adapter.path}: the weights' hash is {found[:16]}, {MANIFEST} says {adapter.id[:16]}",
            fix=f"remove it with `dnd adapters rm {adapter.name}` and make it again",
        )


def _check_stored_hash(folder: Path, adapter: Adapter, layout: LoraLayout) -> None:
    """Read the weights with the layout they were stored with, and hash them."""
    if layout.digest != adapter.layout_digest:
        raise AdapterCorruptError(f"{folder / MANIFEST}: layout_digest does not match its layout")
    check_hash(adapter, read_weights(folder, layout, whole=True), layout)
