"""The adapters that `nearest` chooses from: an `AdapterStore`, searched by the router's index without a threshold."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError
from dnd_sdk.lora_layout import LoraLayout
from dnd_sdk.routing import Router, Thresholds

_NO_THRESHOLD = Thresholds(reuse=-1.0, reuse_single=-1.0, support=-1.0)


class Zoo:
    """Stored adapters that fit one base and encoder."""

    def __init__(self, folder: str | os.PathLike[str], layout: LoraLayout, base_fingerprint: str, encoder: str) -> None:
        """Open the home folder (or its `adapters` folder) that holds the zoo.

        `encoder` is the fingerprint of the encoder whose vectors will be asked with. Adapters for another base, layout
        or encoder, or without exemplars, do not count; `ConfigError` when none is left.
        """
        root = Path(folder).expanduser().absolute()
        self._store = AdapterStore(Home(root.parent if root.name == "adapters" else root))
        self._layout, self._base = layout, base_fingerprint
        mine = [
            a for a in self._store.ls() if (a.base_fingerprint, a.encoder_fingerprint) == (base_fingerprint, encoder)
        ]
        if not any(a.layout_digest == layout.digest and self._store.exemplars(a) is not None for a in mine):
            raise ConfigError(
                f"no adapter in {self._store.root} fits this base and encoder and has exemplars",
                fix="pass a folder with stored adapters of train tasks, made for this base",
            )
        self._router = Router(
            self._store,
            "zoo",
            encoder,
            base_fingerprint,
            _NO_THRESHOLD,
            usable=lambda adapter: adapter.layout_digest == layout.digest,
        )

    def rank(self, pooled: Tensor) -> list[tuple[str, float]]:
        """The nearest adapters' names and index scores for these normalised prompt vectors `(n, C)`, best first."""
        return self._router.route(pooled).neighbours

    def nearest(self, pooled: Tensor) -> Tensor:
        """The flat LoRA vector of the best adapter for these prompts."""
        best = self._store.get(self.rank(pooled)[0][0])
        return self._store.load(best, self._layout, base_fingerprint=self._base)
