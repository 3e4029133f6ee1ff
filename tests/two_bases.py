"""Two tiny bases under the embedded names, with a generator each, as a home of two releases has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_world import save_base, save_encoder, save_generator

from dnd_sdk.config import Home
from dnd_sdk.generator import finding
from dnd_sdk.models import DEFAULT_BASE, EMBEDDED, SMALL_BASE, Base, Encoder, load_base
from dnd_sdk.models.embedded import SOURCE_FILE


def install_bases(root: Path, patch: pytest.MonkeyPatch) -> Home:
    """A home that holds both bases, of the same shapes and other weights; their generators count as shipped."""
    home = Home(root / "home")
    encoder = Encoder.load(str(save_encoder(root / "encoder")), home)
    for seed, name in enumerate((SMALL_BASE, DEFAULT_BASE)):
        save_generator(root / "generators" / name, _install(home, name, seed, patch), encoder)
    patch.setattr(finding, "SHIPPED", root / "generators")
    return home


def _install(home: Home, name: str, seed: int, patch: pytest.MonkeyPatch) -> Base:
    folder, known = save_base(home.models / name, seed=seed), EMBEDDED[name]
    record = {"format_version": 2, "wheels": [{"sha256": wheel.sha256} for wheel in known.wheels]}
    record |= {"files": {p.name: p.stat().st_size for p in folder.iterdir()}}
    (folder / SOURCE_FILE).write_text(json.dumps(record), "utf-8")
    base = load_base(name, home)
    patch.setitem(EMBEDDED, name, replace(known, fingerprint=base.fingerprint))
    return base
