"""`exemplars.safetensors`: the pooled prompt embeddings a router finds an adapter by.

Those that replace others lie beside them as `exemplars-HASH.safetensors`, a file of their own, and count once the
manifest records that hash: so one move of the manifest replaces them, whoever else is at it.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dnd_sdk.errors import AdapterCorruptError, InputError
from dnd_sdk.files import FloatArray, TensorInfo, all_finite, open_safetensors, safetensors_header

EXEMPLARS = "exemplars.safetensors"
MAX_EXEMPLARS_BYTES = 64 * 2**20
MAX_EXEMPLARS = 64
"""Prompt embeddings kept per adapter."""
NONE_KEPT = ""
"""Recorded for an adapter stored without exemplars."""
_SAME = 1e-4
"""Rows nearer than this are the same prompt, encoded in another batch or on another machine."""


def check_exemplars(exemplars: FloatArray) -> FloatArray:
    """Return exemplars (k, C) in one piece; raises `InputError` unless 2-D, finite and not empty."""
    if exemplars.ndim != 2 or exemplars.size == 0:
        raise InputError(f"exemplars must have shape (k, width), got {exemplars.shape}")
    if not all_finite(exemplars):
        raise InputError("exemplars hold NaN or inf")
    if exemplars.nbytes > MAX_EXEMPLARS_BYTES // 2:
        raise InputError(f"exemplars of shape {exemplars.shape} are too many", fix="keep fewer of them")
    return np.ascontiguousarray(exemplars)


def exemplars_bytes(
    exemplars: FloatArray, encoder: str | None, fingerprint: str | None, *, unlike_any: bool = False
) -> bytes:
    """The content of the file; `unlike_any`: with a hash no other has, be the exemplars the same."""
    metadata = {"format": "pt", "encoder": encoder or "", "encoder_fingerprint": fingerprint or ""}
    if unlike_any:
        metadata["replaced"] = uuid.uuid4().hex
    info = TensorInfo("F32", exemplars.shape, 0, exemplars.nbytes)
    return safetensors_header({"exemplars": info}, metadata) + exemplars.tobytes()


def exemplars_hash(data: bytes | None) -> str:
    """What the manifest records of the file: its sha256; `NONE_KEPT` for None."""
    return NONE_KEPT if data is None else hashlib.sha256(data).hexdigest()


def replacement_name(recorded: str) -> str:
    """What the file of that hash is called that replaces another."""
    return f"exemplars-{recorded[:16]}.safetensors"


def exemplars_path(folder: Path, recorded: str | None) -> Path:
    """Where the exemplars are that the manifest records."""
    replaced = folder / replacement_name(recorded or "")
    return replaced if recorded and replaced.is_file() else folder / EXEMPLARS


def exemplars_files(folder: Path) -> Iterator[Path]:
    """All files of exemplars, those that do not count included."""
    return folder.glob("exemplars*.safetensors")


def read_exemplars(folder: Path, recorded: str | None = None) -> FloatArray | None:
    """The exemplars (k, C) in `folder`, None without any.

    `recorded` is what the manifest says of the file, None if nothing. Raises `AdapterCorruptError` when the file is
    damaged or another than the recorded one.
    """
    path = exemplars_path(folder, recorded)
    if not path.is_file():
        if recorded:
            raise AdapterCorruptError(f"{path} is missing, its manifest records one", fix=_fix(folder))
        return None
    exemplars, found = _read(path)
    if recorded == NONE_KEPT:
        raise AdapterCorruptError(f"{path} is there, its manifest does not record one", fix=f"delete {path}")
    if recorded is not None and found != recorded:
        raise AdapterCorruptError(
            f"{path} is another than was stored: its hash is {found[:16]}, the manifest says {recorded[:16]}",
            fix=_fix(folder),
        )
    return exemplars


def merged_exemplars(old: FloatArray | None, new: FloatArray) -> FloatArray | None:
    """Both sets (k, C) without repeats, of the old ones an even sample where room is short; None: `new` adds nothing.

    Sets of another width cannot be compared: then `new` takes the place of `old`.
    """
    if old is None or old.shape[1] != new.shape[1]:
        return new
    # row by row: all differences at once take (new, old, C) values
    added = new[[bool(np.linalg.norm(old - row, axis=1).min() > _SAME) for row in new]]
    if len(added) == 0:
        return None
    room = max(0, min(len(old), MAX_EXEMPLARS - len(added)))
    return np.concatenate([old[np.arange(room) * len(old) // max(room, 1)], added])


def _read(path: Path) -> tuple[FloatArray, str]:
    """The exemplars and the hash of the file they came from: one open file, which nobody replaces between the two."""
    with open_safetensors(path.parent, path.name, MAX_EXEMPLARS_BYTES) as f:
        kinds = {name: (info.dtype, len(info.shape)) for name, info in f.header.items()}
        if kinds != {"exemplars": ("F32", 2)}:
            raise AdapterCorruptError(f"{f.path} must hold one 2-D F32 tensor named exemplars, got {str(kinds)[:200]}")
        exemplars, digest = f.array("exemplars"), f.sha256()
    try:
        return check_exemplars(exemplars), digest
    except InputError as e:
        raise AdapterCorruptError(f"{path}: {e.message}") from e


def _fix(folder: Path) -> str:
    return (
        f"import the adapter again as {folder.name} with --prompts, "
        f"or remove it with `dnd adapters rm {folder.name}` and make it again"
    )
