"""What all prompts of a request begin with is read once.

Chats of one job share the head of their template, often a system message, an instruction or examples: half of their
tokens, or nearly all. The keys and values of that part are computed for one row and copied to the others, so every
batch of the request reads only what differs. Answers are the same up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from dnd_sdk.engine.prompt_store import MIN_SHARED, alike


class Prefix:
    """Tokens that several prompts begin with, and what the base keeps of them."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self._model, self._ids = model, list(ids)
        self._kept: Any = None

    def __len__(self) -> int:
        return len(self._ids)

    def cache(self, n_rows: int) -> Any:
        """Keys and values `(n_rows, ...)` for one forward or generation to extend.

        Reads the tokens on the first call: the caller has set the one adapter that all rows of the request use.
        """
        if self._kept is None:
            ids = torch.tensor([self._ids], device=self._model.device)
            self._kept = self._model.base_model(input_ids=ids, use_cache=True).past_key_values
        copied = copy.deepcopy(self._kept)  # whoever gets it writes into it
        copied.batch_repeat_interleave(n_rows)
        return copied


def shared_prefix(model: Any, prompts: Sequence[list[int]], adapter_ids: Sequence[str | None]) -> Prefix | None:
    """What all `prompts` begin with, leaving each a token of its own; None when there is nothing to gain.

    That is for a single prompt, several adapters (each keeps other keys and values), a base with layers other than full
    attention, and less than `MIN_SHARED` tokens.
    """
    if len(prompts) < 2 or len(set(adapter_ids)) > 1 or not _attends_fully(model):
        return None
    low, high = min(prompts), max(prompts)  # in the order of words in a dictionary: all others begin as these two do
    n = min(alike(low, high), min(map(len, prompts)) - 1)
    return Prefix(model, prompts[0][:n]) if n >= MIN_SHARED else None


def _attends_fully(model: Any) -> bool:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    sliding = getattr(config, "sliding_window", None) is not None
    return kinds <= {"full_attention"} and not sliding and not getattr(model, "_is_stateful", False)
