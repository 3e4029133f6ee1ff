"""Other exemplars for a stored adapter: the files that change then, its weights never among them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from dnd_sdk.adapters.adapter import MANIFEST, Adapter, manifest_text, read_layout
from dnd_sdk.adapters.card import CARD, card_text
from dnd_sdk.adapters.exemplars import (
    exemplars_bytes,
    exemplars_hash,
    merged_exemplars,
    read_exemplars,
    replacement_name,
)
from dnd_sdk.adapters.peft_config import read_config
from dnd_sdk.errors import AdapterCorruptError
from dnd_sdk.files import FloatArray


def refined_files(folder: Path, refined: Adapter, exemplars: FloatArray) -> tuple[Adapter, dict[str, bytes]]:
    """The adapter with checked exemplars (k, C) of its `encoder`, and the content of the files that say so."""
    # a hash of its own each time: so its file is never the one that somebody is just removing
    data = exemplars_bytes(exemplars, refined.encoder, refined.encoder_fingerprint, unlike_any=True)
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    refined = replace(refined, refined=now, exemplars_sha256=exemplars_hash(data))
    layout = read_layout(folder)
    card = card_text(refined, layout, read_config(folder).base_name or "unknown")
    name = replacement_name(refined.exemplars_sha256 or "")
    return refined, {name: data, CARD: card.encode(), MANIFEST: manifest_text(refined, layout).encode()}


def with_more(
    folder: Path, stored: Adapter, exemplars: FloatArray, encoder: str | None, fingerprint: str | None
) -> tuple[Adapter, dict[str, bytes]]:
    """The adapter with these exemplars too, and the files to replace: none if it has them all.

    Exemplars of another encoder cannot be compared with these, and damaged ones are of no use: these take their place.
    """
    try:
        old = read_exemplars(folder, stored.exemplars_sha256)
    except AdapterCorruptError:
        old = None
    both = merged_exemplars(old if stored.encoder_fingerprint == fingerprint else None, exemplars)
    if both is None:
        return stored, {}
    return refined_files(folder, replace(stored, encoder=encoder, encoder_fingerprint=fingerprint), both)
