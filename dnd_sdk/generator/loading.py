"""The generator of a base, loaded and checked: made for these very weights, with this encoder."""

from __future__ import annotations

from pathlib import Path

from dnd_sdk.errors import ConfigError, LayoutMismatchError
from dnd_sdk.generator.finding import shipped_folder
from dnd_sdk.generator.generator import Generator
from dnd_sdk.lora import LoraLayout
from dnd_sdk.models import Base, Encoder


def folder_for(base: Base, folder: Path | None) -> Path | None:
    """`folder`, else the generator shipped for these very weights: a shipped one's base may have another name here."""
    return folder or shipped_folder(base_fingerprint=base.fingerprint)


def load_generator(folder: Path, base: Base) -> Generator:
    """The generator, on the base's device. Raises `LayoutMismatchError` when it was made for another base."""
    made = Generator.from_pretrained(folder)
    wanted = made.layout
    layout = LoraLayout.from_model(
        base.model, r=wanted.r, lora_alpha=wanted.lora_alpha, target_modules=wanted.target_modules
    )
    if layout.digest != wanted.digest or made.base_fingerprint != base.fingerprint:
        shapes = "shapes differ" if layout.digest != wanted.digest else "same shapes, other weights"
        raise LayoutMismatchError(
            f"the generator in {folder} was made for another base than {base.name!r} ({shapes}): fingerprint "
            f"{made.base_fingerprint[:16]}, this base's is {base.fingerprint[:16]}",
            fix="load the base it was trained on, or train one for this base with `dnd train generator`",
        )
    return made.to(base.model.device).eval()


def check_encoder(encoder: Encoder, generator: Generator | None) -> None:
    """Raise `ConfigError` unless the generator, if any, was trained with this encoder."""
    wanted = "" if generator is None else generator.config.encoder_fingerprint
    if generator is not None and wanted and wanted != encoder.fingerprint:
        raise ConfigError(
            f"encoder {encoder.name!r} is not the one the generator was trained with, {generator.encoder_name!r}: "
            f"fingerprint {encoder.fingerprint[:16]}, wanted {wanted[:16]}",
            fix="leave --encoder out",
        )
