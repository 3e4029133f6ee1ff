"""Which forward a base gets: the flat one where it is right, by its configuration and by a trial on the base itself."""

from __future__ import annotations

from typing import Any

import torch

from dnd_sdk.engine.attention import NAME, attach_attention, other_layers
from dnd_sdk.engine.bank import SlotBank
from dnd_sdk.engine.fixed_steps import difference
from dnd_sdk.engine.forward import FlatForward, ModelRow
from dnd_sdk.engine.kv_cache import KeyValueShape
from dnd_sdk.engine.separate import SeparateForward

Forward = FlatForward | SeparateForward

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Of the largest logit: what another order of the same sums may change."""


def forward_for(model: Any, bank: SlotBank, *, store_bytes: int) -> tuple[Forward, str | None]:
    """The base's forward, and why it is not the flat one (None: it is)."""
    with torch.inference_mode():
        why = _unfit(model)
        if why is None:
            attach_attention(model)
            try:
                flat = FlatForward(model, bank, _shape(model), store_bytes=store_bytes)
                why = _tried(model, flat)
            except Exception as e:  # whatever a model of somebody else does
                why = f"{type(e).__name__}: {e}".splitlines()[0]
            if why is None:
                return flat, None
    return SeparateForward(model, bank), why


def _unfit(model: Any) -> str | None:
    config = model.config.get_text_config()
    kinds = other_layers(config)
    if kinds or getattr(model, "_is_stateful", False):
        return f"layers of {', '.join(kinds) or 'a kind that keeps a state'}"
    if config._attn_implementation not in ("sdpa", NAME):
        return f"attention is {config._attn_implementation}, not sdpa"
    return None


def _shape(model: Any) -> KeyValueShape:
    config = model.config.get_text_config()
    n_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    n_kept = getattr(config, "num_key_value_heads", None) or n_heads
    return KeyValueShape(config.num_hidden_layers, n_kept, head_dim, model.dtype, model.device)


def _tried(model: Any, flat: FlatForward) -> str | None:
    """What is wrong with the flat forward of two short texts, read in pieces and written on; None: nothing."""
    size = model.config.get_text_config().vocab_size
    texts = [[(31 * i + 7 * n) % size for i in range(n)] for n in (6, 4)]
    rows = [ModelRow(text[:-1], 0, None, token=text[-1]) for text in texts]
    try:
        plain = torch.cat([model(input_ids=torch.tensor([text], device=model.device)).logits[0, -1:] for text in texts])
        for row in rows:
            flat.start(row)
        flat.run([], [(rows[0], 2)])
        flat.run([], [(rows[0], 3), (rows[1], 3)])
        ours = flat.run(rows, [])
        for row in rows:
            flat.end(row)
    finally:
        flat.forget()
        flat.rest()
    differ = difference(plain, ours, _TOLERANCE.get(plain.dtype, 0.05))
    return f"its logits differ from the plain ones by {differ}" if differ else _misseen(model, flat.windows)


def _misseen(model: Any, windows: dict[int, int | None]) -> str | None:
    """The layer that did not say what window it has: short texts are the same without."""
    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    for layer in range(config.num_hidden_layers):
        expected = window if kinds is None or kinds[layer] == "sliding_attention" else None
        if windows.get(layer, -1) != expected:
            return f"layer {layer} attends to {windows.get(layer, 'nothing')}, its configuration says {expected}"
    return None
