"""What a stored adapter must satisfy: whole, of this base, its weights those its id was taken from."""

from __future__ import annotations

from pathlib import Path

from dnd_sdk.adapters.adapter import MANIFEST, Adapter, check_name, read_adapter, read_layout
from dnd_sdk.adapters.exemplars import read_exemplars
from dnd_sdk.adapters.peft_folder import adapter_id, read_weights
from dnd_sdk.errors import AdapterCorruptError, LayoutMismatchError
from dnd_sdk.files import FloatArray
from dnd_sdk.lora import LoraLayout


def check_folder(folder: Path) -> None:
    """Read everything a stored folder holds and hash its weights; raises what is wrong."""
    check_name(folder.name)
    adapter, layout = read_adapter(folder)
    _check_stored_hash(folder, adapter, layout)
    read_exemplars(folder, adapter.exemplars_sha256)


def check_base(adapter: Adapter, base_fingerprint: str | None) -> None:
    """Raise `LayoutMismatchError` unless the adapter was made for this base; None skips the comparison."""
    if base_fingerprint is not None and adapter.base_fingerprint != base_fingerprint:
        raise LayoutMismatchError(
            f"adapter {adapter.name!r} was made for another base model: got fingerprint "
            f"{adapter.base_fingerprint[:16]}, expected {base_fingerprint[:16]}",
            fix="load the base model it was made for, or adapt again on this one",
        )


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
