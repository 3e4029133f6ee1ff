"""Shared by the adapter tests: a tiny layout, a store call with the fields filled in, and hand-made PEFT folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import random_flat
from safetensors.torch import save_file

from dnd_sdk.adapters import Adapter, AdapterStore
from dnd_sdk.adapters.incoming import read_incoming
from dnd_sdk.adapters.peft_config import read_config
from dnd_sdk.adapters.peft_folder import read_peft
from dnd_sdk.lora.layout import LoraLayout, LoraModule

TINY = LoraLayout(4, 8.0, ("q_proj", "v_proj"), (LoraModule("m.0.q_proj", 6, 10), LoraModule("m.0.v_proj", 6, 5)))
BASE = "b" * 64


def store_one(store: AdapterStore, flat: torch.Tensor | None = None, layout: LoraLayout = TINY, **more: Any) -> Adapter:
    """Put `flat` (default: random) with plausible fields."""
    fields = {"base_name": "tiny", "base_fingerprint": BASE, "source": "generated"} | more
    return store.put(random_flat(layout) if flat is None else flat, layout, **fields)


def peft_tensors(layout: LoraLayout = TINY, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under PEFT's names."""
    return {s.peft_key: view.clone() for s, view in layout.views(random_flat(layout, seed=seed))}


def peft_folder(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, layout: LoraLayout = TINY, **config: Any
) -> Path:
    """Write a PEFT folder by hand, with safetensors' own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors(layout) if tensors is None else tensors, folder / "adapter_model.safetensors")
    plain = {
        "peft_type": "LORA",
        "r": layout.r,
        "lora_alpha": layout.lora_alpha,
        "target_modules": list(layout.target_modules),
        "base_model_name_or_path": "someone/base",
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def listed(root: Path) -> list[str]:
    """What is in a store's folder but for its journal, whatever is left unfinished included."""
    inside = [f".store/{p.name}" for p in (root / ".store").glob("*") if p.name != "journal.jsonl"]
    return sorted([p.name for p in root.iterdir() if p.name != ".store"] + inside)


def seen(store: AdapterStore) -> int:
    """How many changes a store has noticed so far."""
    return store.changes(0).now


def read_flat(folder: Path, layout: LoraLayout = TINY, *, foreign: bool = False) -> torch.Tensor:
    """The flat vector of a PEFT folder."""
    return torch.from_numpy(read_peft(folder, layout, read_config(folder), foreign=foreign).flat)


def notes_of(folder: Path, layout: LoraLayout = TINY, base_name: str = "") -> tuple[str, ...]:
    """What an import of `folder` into a base of that name tells."""
    return read_incoming(folder, layout, BASE, base_name).notes


def exemplars(k: int = 3, width: int = 5, seed: int = 1) -> torch.Tensor:
    """Normalised vectors `(k, width)`."""
    return torch.nn.functional.normalize(torch.randn(k, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def everything(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
