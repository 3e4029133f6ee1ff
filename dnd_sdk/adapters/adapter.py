"""The `Adapter` value, its name rule, and `dnd.json` beside the PEFT files.

* The folder's name is the adapter's name: `dnd.json` does not repeat it, so moving a folder renames the adapter.
* `dnd.json` holds the whole layout, so a stored adapter can be hashed again without its base model.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

from dnd_sdk.errors import AdapterCorruptError, ConfigError, InputError, LayoutMismatchError, shown
from dnd_sdk.files import is_finite_number, read_json
from dnd_sdk.lora import LoraLayout
from dnd_sdk.prompts import Role

MANIFEST = "dnd.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 4 * 2**20
_MAX_KEPT = 2**18
"""Characters of a layout that is kept for the next manifest; those of large bases have a tenth."""
SOURCES = ("generated", "imported", "merged", "trained")
ORIGINS = ("axolotl", "llama-factory", "peft", "trl", "xtuner")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Adapter:
    """One stored adapter: what it is and where; its weights stay on disk until asked for."""

    name: str
    id: str
    """sha256 over the layout digest and the fp32 weights: equal ids mean equal weights."""
    path: Path
    source: str
    """One of `SOURCES`."""
    created: str
    """ISO 8601, UTC."""
    base_fingerprint: str
    layout_digest: str
    prompt_hash: str | None = None
    n_prompts: int | None = None
    generator: str | None = None
    encoder: str | None = None
    """Name of the encoder that made the exemplars; None without exemplars."""
    scores: dict[str, float] = field(default_factory=dict, hash=False)
    encoder_fingerprint: str | None = None
    origin: str | None = None
    """Of an imported one: the tool that wrote it, as far as file names tell; one of `ORIGINS`."""
    parents: dict[str, float] = field(default_factory=dict, hash=False)
    """Of a merged one: the ids it was merged from and their weights."""
    role: str | None = None
    """The role prompt it was made under, which also is its system message; None: none."""
    refined: str | None = None
    """When its exemplars were last replaced, ISO 8601, UTC; None: never."""
    exemplars_sha256: str | None = None
    """Of the exemplars' file; empty: it has none; None: not recorded (stored by an earlier version)."""


class About(TypedDict, total=False):
    """What may be said of an adapter when it is stored: fields of `Adapter`."""

    prompt_hash: str | None
    """Of the prompt set it was made for."""
    n_prompts: int | None
    """Size of that set."""
    generator: str | None
    """The generator's id."""
    encoder: str | None
    """Name of the encoder that made the exemplars."""
    encoder_fingerprint: str | None
    scores: dict[str, float]
    """Measured figures, by name."""
    origin: str | None
    """The tool that wrote an imported one."""
    parents: dict[str, float]
    """Ids and weights of what a merged one was made from."""
    role: str | None
    """The role prompt it was made under; the same weights under another role are another adapter."""


@dataclass(frozen=True)
class Problem:
    """One thing `AdapterStore.verify` found wrong."""

    name: str
    what: str
    fix: str


def is_name(name: str) -> bool:
    """Whether `name` may be an adapter's name; nothing it accepts can leave the adapters folder."""
    # "___" separates parts of request names elsewhere, so no adapter may hold it
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and "___" not in name


def check_name(name: str) -> str:
    """Return `name`, or raise `ConfigError`."""
    if not is_name(name):
        raise ConfigError(
            f"adapter name {shown(name)} is not allowed",
            fix="use 1-64 of a-z 0-9 . _ -, starting with a letter or digit, without '___'",
        )
    return name


def default_name(adapter_id: str, role: str | None = None, base_fingerprint: str | None = None) -> str:
    """The name of an adapter nobody named; with the base where the same weights are another base's, too."""
    more = (text for text in (role, base_fingerprint) if text is not None)
    return "-".join([f"dnd-{adapter_id[:16]}", *(hashlib.sha256(text.encode()).hexdigest()[:8] for text in more)])


def manifest_text(adapter: Adapter, layout: LoraLayout) -> str:
    """The content of `dnd.json`."""
    fields = adapter_fields(adapter)
    return json.dumps({"format_version": FORMAT_VERSION, **fields, "layout": layout.to_dict()}) + "\n"


def read_manifest(folder: Path) -> Adapter:
    """The adapter in `folder`. Raises `AdapterCorruptError` when `dnd.json` is missing, damaged or too new."""
    return adapter_from(folder, _load(folder))


def read_layout(folder: Path) -> LoraLayout:
    """The layout the adapter in `folder` was stored with; raises like `read_manifest`."""
    return _layout(folder, _load(folder))


def read_adapter(folder: Path) -> tuple[Adapter, LoraLayout]:
    """The adapter in `folder` and the layout it was stored with, from one reading; raises like `read_manifest`."""
    data = _load(folder)
    return adapter_from(folder, data), _layout(folder, data)


def adapter_fields(adapter: Adapter) -> dict[str, Any]:
    """What is kept of an adapter, JSON-able: all but its name and path."""
    return {key: getattr(adapter, key) for key in _FIELDS}


def adapter_from(folder: Path, data: dict[str, Any]) -> Adapter:
    """The adapter in `folder` from its fields; raises `AdapterCorruptError` when one is not as it must be."""
    values: dict[str, Any] = {}
    for key, valid in _FIELDS.items():
        values[key] = data.get(key, _ABSENT.get(key))
        if not valid(values[key]):
            raise AdapterCorruptError(f"{folder / MANIFEST}: {key} is {str(values[key])[:80]!r}", fix=_fix(folder))
    for key in ("scores", "parents"):
        values[key] = {k: float(v) for k, v in values[key].items()}
    return Adapter(name=folder.name, path=folder, **values)


def _layout(folder: Path, data: dict[str, Any]) -> LoraLayout:
    try:
        # the same object for the same text: adapters of one base share a layout, and what it has worked out
        text = json.dumps(data.get("layout") or {})
        layout = (_layout_once if len(text) <= _MAX_KEPT else _layout_of)(text)
    except (LayoutMismatchError, ConfigError, OverflowError, RecursionError) as e:
        raise AdapterCorruptError(f"{folder / MANIFEST}: {str(e)[:200]}", fix=_fix(folder)) from e
    if any(m.in_features < 1 or m.out_features < 1 for m in layout.modules):
        raise AdapterCorruptError(f"{folder / MANIFEST}: its layout has a module without features", fix=_fix(folder))
    return layout


def _layout_of(text: str) -> LoraLayout:
    return LoraLayout.from_dict(json.loads(text))


_layout_once = lru_cache(maxsize=8)(_layout_of)


def _load(folder: Path) -> dict[str, Any]:
    data = read_json(folder, MANIFEST, MAX_MANIFEST_BYTES)
    version = data.get("format_version")
    if version == FORMAT_VERSION:
        return data
    fix = "upgrade dnd-sdk" if isinstance(version, int) and version > FORMAT_VERSION else _fix(folder)
    raise AdapterCorruptError(
        f"{folder / MANIFEST}: format_version is {str(version)[:40]}, this version reads {FORMAT_VERSION}", fix=fix
    )


def _fix(folder: Path) -> str:
    return f"remove it with `dnd adapters rm {folder.name}`"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096


def _is_text_or_none(value: object) -> bool:
    return value is None or _is_text(value)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_count_or_none(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _is_scores(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_finite_number, value.values()))


def _is_role_or_none(value: object) -> bool:
    if not isinstance(value, str):
        return value is None
    try:
        Role.parse(value)
    except InputError:
        return False
    return True


def _is_parents(value: object) -> bool:
    return isinstance(value, dict) and _is_scores(value) and all(map(_is_sha256, value))


_FIELDS = {
    "id": _is_sha256,
    "source": lambda value: value in SOURCES,
    "created": _is_time,
    "base_fingerprint": _is_text,
    "layout_digest": _is_sha256,
    "prompt_hash": _is_text_or_none,
    "n_prompts": _is_count_or_none,
    "generator": _is_text_or_none,
    "encoder": _is_text_or_none,
    "encoder_fingerprint": _is_text_or_none,
    "refined": lambda value: value is None or _is_time(value),
    "exemplars_sha256": lambda value: value is None or value == "" or _is_sha256(value),
    "scores": _is_scores,
    "origin": lambda value: value is None or value in ORIGINS,
    "parents": _is_parents,
    "role": _is_role_or_none,
}
_ABSENT: dict[str, Any] = {"parents": {}}
"""What a key stands for that adapters stored by earlier versions do not have; None where nothing is said."""
