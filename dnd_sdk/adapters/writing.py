"""An adapter's folder as the store writes it: PEFT's two files, the manifest, the card and any exemplars."""

from __future__ import annotations

from pathlib import Path

from dnd_sdk.adapters.adapter import MANIFEST, About, Adapter, manifest_text
from dnd_sdk.adapters.card import CARD, card_text
from dnd_sdk.adapters.exemplars import EXEMPLARS, check_exemplars, exemplars_bytes
from dnd_sdk.adapters.peft_config import CONFIG, config_text
from dnd_sdk.adapters.peft_folder import WEIGHTS, write_weights
from dnd_sdk.files import FloatArray
from dnd_sdk.lora import LoraLayout


def write_folder(
    folder: Path, adapter: Adapter, flat: FloatArray, layout: LoraLayout, base_name: str, exemplars: bytes | None
) -> None:
    """Fill an empty folder; `exemplars` is the content of their file. Raises `OSError`."""
    write_weights(folder / WEIGHTS, flat, layout)
    (folder / CONFIG).write_text(config_text(layout, base_name), encoding="utf-8")
    (folder / MANIFEST).write_text(manifest_text(adapter, layout), encoding="utf-8")
    (folder / CARD).write_text(card_text(adapter, layout, base_name), encoding="utf-8")
    if exemplars is not None:
        (folder / EXEMPLARS).write_bytes(exemplars)


def exemplars_file(exemplars: FloatArray, about: About) -> bytes:
    """The content of the exemplars' file, after a check; raises `InputError`."""
    encoder, fingerprint = about.get("encoder"), about.get("encoder_fingerprint")
    return exemplars_bytes(check_exemplars(exemplars), encoder, fingerprint)
