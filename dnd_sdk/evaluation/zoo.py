"""The adapters that `nearest` chooses from: an `AdapterStore` folder, searched without any threshold."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from dnd_sdk.adapters import Adapter, AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError
from dnd_sdk.lora_layout import LoraLayout


class Zoo:
    """Stored adapters that fit one base, with their exemplars in memory and their weights on disk."""

    def __init__(self, folder: str | os.PathLike[str], layout: LoraLayout, base_fingerprint: str, encoder: str) -> None:
        """Open the home folder (or its `adapters` folder) that holds the zoo.

        `encoder` is the fingerprint of the encoder whose vectors `nearest` will get. Adapters for another base or
        encoder, or without exemplars, are passed over; `ConfigError` when none is left.
        """
        root = Path(folder).expanduser().absolute()
        home = Home(root.parent if root.name == "adapters" else root)
        self._store, self._layout, self._base = AdapterStore(home), layout, base_fingerprint
        self._exemplars: list[tuple[Adapter, Tensor]] = []
        for adapter in self._store.ls():
            if adapter.base_fingerprint == base_fingerprint and adapter.encoder_fingerprint in (None, encoder):
                exemplars = self._store.exemplars(adapter)
                if exemplars is not None:
                    self._exemplars.append((adapter, exemplars))
        if not self._exemplars:
            raise ConfigError(
                f"no adapter in {home.adapters} fits this base and encoder and has exemplars",
                fix="pass the folder of a zoo trained for this base (dnd train zoo)",
            )

    def __len__(self) -> int:
        return len(self._exemplars)

    def rank(self, pooled: Tensor) -> list[tuple[Adapter, float]]:
        """Every adapter with its score for these normalised prompt vectors `(n, C)`, best first.

        The score is the mean, over the prompts, of the cosine to the adapter's nearest exemplar.
        """
        scores = [float((pooled @ exemplars.T).max(dim=1).values.mean()) for _, exemplars in self._exemplars]
        order = torch.tensor(scores).argsort(descending=True, stable=True).tolist()
        return [(self._exemplars[i][0], scores[i]) for i in order]

    def nearest(self, pooled: Tensor) -> Tensor:
        """The flat LoRA vector of the best adapter for these prompts."""
        best, _ = self.rank(pooled)[0]
        return self._store.load(best, self._layout, base_fingerprint=self._base)
