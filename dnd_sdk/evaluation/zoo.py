"""What a zoo gives without a generator: its nearest adapter, merges of them, and its shared multi-task LoRA.

* The adapters are an `AdapterStore`, compared with a prompt set as the router compares them, without a threshold.
* Merging averages B, which is the mean of the weight updates only while every adapter has the same A, as those of
  `dnd train zoo` do; a zoo of other adapters is refused.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnd_sdk.adapters import Adapter, AdapterStore, check_flat
from dnd_sdk.config import Home
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, ConfigError
from dnd_sdk.files import FLOATS, MAX_HEADER_BYTES, open_safetensors, read_json
from dnd_sdk.lora import LoraLayout, merge_sharing_a
from dnd_sdk.routing import check_vectors, set_similarity

SHARED = "shared.safetensors"
"""The multi-task LoRA in the run folder: `dnd train generator` puts it beside the adapters."""
_MAX_RECORD_BYTES = 64 * 2**20


class Zoo:
    """Stored adapters that fit one base and encoder."""

    def __init__(self, folder: str | os.PathLike[str], layout: LoraLayout, base_fingerprint: str, encoder: str) -> None:
        """Open the run folder of `dnd train generator`, any home folder, or the `adapters` folder in one.

        `encoder` is the fingerprint of the encoder whose vectors will be asked with. Adapters for another base, layout
        or encoder, or without exemplars, do not count; `ConfigError` when none is left.
        """
        root = Path(folder).expanduser().absolute()
        self._root = root.parent if root.name == "adapters" else root
        self._store = AdapterStore(Home(self._root))
        self._layout, self._base = layout, base_fingerprint
        key = (base_fingerprint, encoder, layout.digest)
        fitting = (a for a in self._store.ls() if (a.base_fingerprint, a.encoder_fingerprint, a.layout_digest) == key)
        exemplars = ((a, self._store.exemplars(a)) for a in fitting)
        self._adapters = {a.name: (a, check_vectors(v)) for a, v in exemplars if v is not None}
        if not self._adapters:
            raise ConfigError(
                f"no adapter in {self._store.root} fits this base and encoder and has exemplars",
                fix="pass the run folder of dnd train generator, made for this base and encoder",
            )

    def rank(self, pooled: Tensor) -> list[tuple[str, float]]:
        """Every adapter's name and similarity to these normalised prompt vectors `(n, C)`, best first."""
        query = check_vectors(pooled)
        scores = [(name, set_similarity(query, vectors)) for name, (_, vectors) in self._adapters.items()]
        return sorted(scores, key=lambda s: (-s[1], s[0]))

    def nearest(self, pooled: Tensor) -> Tensor:
        """The flat LoRA vector of the best adapter for these prompts."""
        return self.load(self.rank(pooled)[0][0])

    def merge(self, pooled: Tensor, k: int) -> Tensor:
        """The `k` best adapters (fewer if there are fewer), weighted by similarity; `ConfigError` as for `mean`."""
        best = self.rank(pooled)[:k]
        weights = torch.tensor([max(score, 0.0) for _, score in best])
        weights = weights / weights.sum() if weights.any() else torch.full_like(weights, 1 / len(best))
        return self._merged(dict(zip((name for name, _ in best), weights.tolist(), strict=True)))

    def mean(self) -> Tensor:
        """The uniform mean of all adapters; `ConfigError` unless they share A."""
        return self._mean

    @cached_property
    def _mean(self) -> Tensor:
        return self._merged(dict.fromkeys(sorted(self._adapters), 1 / len(self._adapters)))

    def multitask(self) -> Tensor | None:
        """The zoo's shared multi-task LoRA, None when the folder has none; raises on a damaged or unfitting one."""
        if not (self._root / SHARED).exists():
            return None
        path, limit = self._root / SHARED, 4 * self._layout.n_parameters + MAX_HEADER_BYTES
        with open_safetensors(self._root, SHARED, limit) as reader:
            if {n: i.dtype in FLOATS for n, i in reader.header.items()} != {"shared": True}:
                raise AdapterCorruptError(f"{path} must hold one tensor of floats named 'shared'")
            return check_flat(torch.from_numpy(reader.array("shared")), self._layout)

    def training_settings(self) -> dict[str, Any]:
        """The settings that the zoo's run folder records, as `dnd train` read them; empty when it records none."""
        folder = self._root / "generator"
        if not (folder / "training.json").exists():
            return {}
        settings = read_json(folder, "training.json", _MAX_RECORD_BYTES).get("settings")
        return settings if isinstance(settings, dict) else {}

    def load(self, name: str) -> Tensor:
        """The flat LoRA vector of one adapter; raises `AdapterNotFoundError`."""
        if name not in self._adapters:
            raise AdapterNotFoundError(f"no adapter {name!r} in {self._store.root} fits this base and encoder")
        adapter: Adapter = self._adapters[name][0]
        return self._store.load(adapter, self._layout, base_fingerprint=self._base)

    def _merged(self, weights: dict[str, float]) -> Tensor:
        try:
            return merge_sharing_a(self.load, weights, self._layout)
        except ConfigError as e:
            fix = "pass the zoo of one dnd train zoo run, or drop mean and merge-K"
            raise ConfigError(f"{self._store.root}: {e}", fix=fix) from e
