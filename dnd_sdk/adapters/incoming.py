"""What a folder brings that is to be imported, checked before anything is stored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dnd_sdk.adapters.adapter import MANIFEST, read_manifest
from dnd_sdk.adapters.checks import check_base, check_read_hash
from dnd_sdk.adapters.exemplars import read_exemplars
from dnd_sdk.adapters.foreign import find_adapter, other_base, read_foreign
from dnd_sdk.adapters.peft_config import read_config
from dnd_sdk.adapters.peft_folder import check_plausible
from dnd_sdk.lora import LoraLayout

_KEPT = ("prompt_hash", "n_prompts", "generator", "scores", "parents", "role")


@dataclass(frozen=True)
class Incoming:
    """One folder's weights, and what it says of itself."""

    flat: Tensor
    base_name: str | None
    origin: str | None
    exemplars: Tensor | None
    encoder: str | None
    encoder_fingerprint: str | None
    kept: dict[str, Any]
    """Of an exported adapter: the fields it keeps."""


def read_incoming(
    path: str | os.PathLike[str], layout: LoraLayout, base_fingerprint: str, base_name: str | None
) -> Incoming:
    """Read a folder for a base of this layout; raises like `find_adapter`, `read_foreign` and all the checks."""
    folder, origin = find_adapter(path)
    known = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if known is not None:
        check_base(known, base_fingerprint)
    named_base = read_config(folder).base_name
    flat = read_foreign(folder, layout, ours=known is not None, named=other_base(named_base, base_name))
    if known is not None:  # first: where the hash is wrong, that is what is wrong
        check_read_hash(folder, known, flat, layout)
    check_plausible(flat, layout, str(folder))
    if known is None:
        return Incoming(flat, named_base, origin, None, None, None, {})
    exemplars = read_exemplars(folder, known.exemplars_sha256)
    kept = {key: getattr(known, key) for key in _KEPT}
    return Incoming(flat, named_base, known.origin, exemplars, known.encoder, known.encoder_fingerprint, kept)
