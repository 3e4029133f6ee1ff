"""The slower forward that any causal base of transformers can do: one request after the other, each with its own cache.

For bases with layers that keep a state (Mamba and its hybrids), attention that needs more than positions, or whatever
else the flat forward is not right for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dnd_sdk.engine.bank import SlotBank
from dnd_sdk.engine.forward import ModelRow
from dnd_sdk.lora import using

_CACHES = ("past_key_values", "cache_params")
"""What models call the state that they return and take back."""


class SeparateForward:
    """Same calls as `FlatForward`."""

    together = False
    """Rows gain nothing from each other, and one that was advanced cannot be advanced again."""
    token_bytes = 0
    """Unknown: only the number of rows bounds what runs at once."""

    def __init__(self, model: Any, bank: SlotBank) -> None:
        self._model, self._bank = model, bank

    def must_wait(self, adapter_key: Any, prompt: Sequence[int]) -> bool:
        """Never: nothing is shared."""
        return False

    def start(self, row: ModelRow, others: Iterable[Sequence[int]] = ()) -> None:
        """Take a row in."""
        row.extra = {}

    def end(self, row: ModelRow) -> None:
        """Let a row go."""
        row.extra = {}

    def rest(self) -> None:
        """Nothing is kept."""

    def forget(self) -> None:
        """Nothing is kept."""

    def ordered(self, writing: Sequence[ModelRow]) -> list[ModelRow]:
        """As they come."""
        return list(writing)

    def run(self, writing: Sequence[ModelRow], reading: Sequence[tuple[ModelRow, int]]) -> Tensor:
        """See `FlatForward.run`; prompts are read whole, whatever piece is asked for."""
        found = [self._forward(row, [row.token]) for row in writing]
        for row, _ in reading:
            found.append(self._forward(row, row.prompt))
        return torch.cat(found)

    def _forward(self, row: ModelRow, new: Sequence[int]) -> Tensor:
        """Logits `(1, V)` after the new tokens."""
        ids = torch.tensor([new], device=self._model.device)
        with using(self._bank.adapted(row.adapter_row)):
            out = self._model(input_ids=ids, use_cache=True, **row.extra)
        row.extra = {name: out[name] for name in _CACHES if name in out}
        row.n_read += len(new)
        logits: Tensor = out.logits[:, -1]  # (1, T, V) -> (1, V)
        return logits
