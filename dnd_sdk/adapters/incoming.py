"""What a folder brings that is to be imported, checked before anything is stored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from dnd_sdk.adapters.adapter import MANIFEST, read_manifest
from dnd_sdk.adapters.checks import check_base, check_read_hash
from dnd_sdk.adapters.exemplars import read_exemplars
from dnd_sdk.adapters.foreign import find_adapter, notes_on, other_base, read_foreign
from dnd_sdk.adapters.peft_config import read_config
from dnd_sdk.adapters.peft_folder import check_plausible
from dnd_sdk.files import FloatArray
from dnd_sdk.lora import LoraLayout

_KEPT = ("prompt_hash", "n_prompts", "generator", "scores", "parents", "role")


@dataclass(frozen=True)
class Incoming:
    """One folder's weights, and what it says of itself."""

    flat: FloatArray
    layout: LoraLayout
    """Of `flat`."""
    base_name: str | None
    origin: str | None
    exemplars: FloatArray | None
    encoder: str | None
    encoder_fingerprint: str | None
    kept: dict[str, Any]
    """Of an exported adapter: the fields it keeps."""
    notes: tuple[str, ...]
    """What someone who imports it should know."""


def read_incoming(
    path: str | os.PathLike[str],
    layout: LoraLayout,
    base_fingerprint: str,
    base_name: str | None,
    least_r: int | None = None,
) -> Incoming:
    """Read a folder for a base of this layout; raises like `find_adapter`, `read_foreign` and all the checks.

    `least_r` has it read at its own rank, or at this one if that is larger; None: at the layout's.
    """
    folder, origin = find_adapter(path)
    known = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if known is not None:
        check_base(known, base_fingerprint)
    settings = read_config(folder)
    if least_r is not None:
        own = max(settings.rank_of(m.name) for m in layout.modules)
        layout = layout.at_rank(min(layout.r, max(own, least_r)))
    named = other_base(settings.base_name, base_name)
    flat, left_out = read_foreign(folder, layout, settings, ours=known is not None, named=named)
    if known is not None:  # first: where the hash is wrong, that is what is wrong
        check_read_hash(folder, known, flat, layout)
    check_plausible(flat, layout, str(folder))
    notes = notes_on(folder, settings, left_out, named)
    if known is None:
        return Incoming(flat, layout, settings.base_name, origin, None, None, None, {}, notes)
    exemplars = read_exemplars(folder, known.exemplars_sha256)
    kept = {key: getattr(known, key) for key in _KEPT}
    encoder = known.encoder, known.encoder_fingerprint
    return Incoming(flat, layout, settings.base_name, known.origin, exemplars, *encoder, kept, notes)
