"""`exemplars.safetensors`: the pooled prompt embeddings a router finds an adapter by."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dnd_sdk.errors import AdapterCorruptError, InputError
from dnd_sdk.files import open_safetensors

EXEMPLARS = "exemplars.safetensors"
MAX_EXEMPLARS_BYTES = 64 * 2**20


def check_exemplars(exemplars: Tensor) -> Tensor:
    """Return exemplars (k, C) as contiguous fp32 on the CPU; raises `InputError` unless 2-D, finite and not empty."""
    if exemplars.dim() != 2 or exemplars.numel() == 0:
        raise InputError(f"exemplars must have shape (k, width), got {tuple(exemplars.shape)}")
    exemplars = exemplars.detach().to("cpu", torch.float32).contiguous()
    if not torch.isfinite(exemplars).all():
        raise InputError("exemplars hold NaN or inf")
    if exemplars.numel() * 4 > MAX_EXEMPLARS_BYTES // 2:
        raise InputError(f"exemplars of shape {tuple(exemplars.shape)} are too many", fix="keep fewer of them")
    return exemplars


def write_exemplars(folder: Path, exemplars: Tensor, encoder: str | None, fingerprint: str | None) -> None:
    """Write checked exemplars with the encoder that made them."""
    (folder / EXEMPLARS).write_bytes(exemplars_bytes(exemplars, encoder, fingerprint))


def exemplars_bytes(exemplars: Tensor, encoder: str | None, fingerprint: str | None) -> bytes:
    """The content of the file."""
    metadata = {"format": "pt", "encoder": encoder or "", "encoder_fingerprint": fingerprint or ""}
    data: bytes = save({"exemplars": exemplars}, metadata)
    return data


def read_exemplars(folder: Path) -> Tensor | None:
    """The exemplars (k, C) in `folder`, None without any; raises `AdapterCorruptError` when they are damaged."""
    if not (folder / EXEMPLARS).is_file():
        return None
    with open_safetensors(folder, EXEMPLARS, MAX_EXEMPLARS_BYTES) as f:
        kinds = {name: (info.dtype, len(info.shape)) for name, info in f.header.items()}
        if kinds != {"exemplars": ("F32", 2)}:
            raise AdapterCorruptError(f"{f.path} must hold one 2-D F32 tensor named exemplars, got {str(kinds)[:200]}")
        exemplars = f.read()["exemplars"]
    try:
        return check_exemplars(exemplars)
    except InputError as e:
        raise AdapterCorruptError(f"{folder / EXEMPLARS}: {e.message}") from e
