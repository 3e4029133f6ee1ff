"""Attention of a flat forward: tokens of many requests in one row, each seeing those of its own request only.

transformers' models look their attention up by name and hand it the new tokens' queries, keys and values. Under the
name here that is, while a `Step` is set, attention over what `kv_cache.py` keeps; otherwise it is their own `sdpa`, to
the last bit.

* Rows that write an answer have one token each; those of a lane are one batched product over the lane's memory, query
  heads that share a key head side by side, so nothing is copied.
* A prompt's piece sees itself, causally, and what was read of its prompt before.
* Layers that see a window of tokens only pass its width along, and it is kept to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dnd_sdk.engine.kv_cache import Lane
from dnd_sdk.lora import SegmentedLora, using

NAME = "dnd_rows"
_UNKNOWN = ("softcap", "position_bias", "s_aux")
"""What some models ask of their attention, and this one cannot do."""

_WIDTH = 64
"""Attention reads a lane up to its longest row, rounded up to this: few shapes, and never much in vain."""


class LanePart:
    """Neighbouring rows of one lane, one token each."""

    def __init__(self, lane: Lane[Any], first: int, positions: Tensor, width: int) -> None:
        """`positions` `(n,)` of the new tokens, from row `first` on; `width`: how many tokens of each row are read."""
        self.n = positions.shape[0]
        self._lane, self._rows, self._width = lane, slice(first, first + self.n), width
        self._positions = positions
        # (rows, length) -> (rows * length,): where the new tokens are written
        self._at = positions + torch.arange(first, first + self.n, device=positions.device) * lane.length
        self._masks: dict[int | None, Tensor] = {}

    @classmethod
    def of(cls, lane: Lane[Any], first: int, positions: Sequence[int]) -> LanePart:
        """With no more of the lane read than the longest row needs."""
        width = min(lane.length, -(-(max(positions) + 1) // _WIDTH) * _WIDTH)
        return cls(lane, first, torch.tensor(positions, device=lane.kv.device), width)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """`q` `(n, H, D)`, `k` and `v` `(n, H', D)` of the new tokens, which are kept; returns `(n, H, D)`."""
        keys, values = self._lane.kv[layer].unbind(0)  # (2, rows, length, H', D) -> (rows, length, H', D)
        keys.flatten(0, 1).index_copy_(0, self._at, k)
        values.flatten(0, 1).index_copy_(0, self._at, v)
        out = nn.functional.scaled_dot_product_attention(
            q.unflatten(1, (k.shape[1], -1)),  # (n, H, D) -> (n, H', H / H', D)
            keys[self._rows, : self._width].transpose(1, 2),  # (n, width, H', D) -> (n, H', width, D)
            values[self._rows, : self._width].transpose(1, 2),
            attn_mask=self._mask(window, q.dtype),
            scale=scale,
        )
        return out.flatten(1, 2)  # (n, H', H / H', D) -> (n, H, D)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self._masks:
            column = torch.arange(self._width, device=self._positions.device)
            seen = _seen(self._positions[:, None] - column, window)  # (n, width)
            self._masks[window] = additive(seen, dtype)[:, None, None]  # (n, width) -> (n, 1, 1, width)
        return self._masks[window]


class PromptPart:
    """The next piece of one prompt."""

    def __init__(self, kv: Tensor, start: int, n: int) -> None:
        """`kv` `(layers, 2, tokens, H', D)`: the prompt's own, of which `start` are known."""
        self.n = n
        self._kv, self._start = kv, start
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """As `LanePart.attend`."""
        end, group = self._start + self.n, q.shape[1] // k.shape[1]
        kept = self._kv[layer, :, self._start : end]
        kept[0].copy_(k)
        kept[1].copy_(v)
        if self._start:
            k, v = self._kv[layer, :, :end].unbind(0)
        # (tokens, H, D) -> (1, H, tokens, D), keys and values once per query head
        q, k, v = q.transpose(0, 1)[None], _repeated(k, group), _repeated(v, group)
        whole = not self._start and (window is None or end <= window)
        mask = None if whole else self._mask(window, q.dtype)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, scale=scale)
        return out[0].transpose(0, 1)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self._masks:
            device, end = self._kv.device, self._start + self.n
            distance = torch.arange(self._start, end, device=device)[:, None] - torch.arange(end, device=device)
            self._masks[window] = additive(_seen(distance, window), dtype)
        return self._masks[window]


Part = LanePart | PromptPart


class Step:
    """What the tokens of one forward belong to, in their order."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.windows: dict[int, int | None] = {}
        """By layer, how many tokens it saw; None: all."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """`q` `(T, H, D)`, `k` and `v` `(T, H', D)` of all tokens; returns `(T, H, D)`."""
        self.windows[layer] = window
        sizes = [part.n for part in self.parts]
        cut = zip(self.parts, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        out = [part.attend(layer, own_q, own_k, own_v, scale, window) for part, own_q, own_k, own_v in cut]
        return out[0] if len(out) == 1 else torch.cat(out)


_step: ContextVar[Step | None] = ContextVar("dnd_step", default=None)


@contextmanager
def stepping(step: Step) -> Iterator[None]:
    """Forwards of attached models inside this block, in this context only, are `step`."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def attach_attention(model: Any) -> None:
    """Let a model that uses `sdpa` attend by this module; what it computes outside of `stepping` stays the same."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def flat_logits(
    model: Any, ids: Tensor, positions: Tensor, mask: Tensor, step: Step, lora: SegmentedLora | None, **options: Any
) -> Tensor:
    """Logits `(T, V)` of a forward of tokens `ids` `(1, T)` at `positions` `(1, T)` that belong to `step`.

    `mask`: any of four dimensions; the model then makes none, and attention here needs none.
    """
    with using(lora), stepping(step):
        out = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, **options)
    logits: Tensor = out.logits[0]  # (1, T, V) -> (T, V)
    return logits


def other_layers(config: Any) -> list[str]:
    """The kinds of a model's layers that are not plain attention, to everything or to a window."""
    return sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    step = _step.get()
    if step is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    asked = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if asked:
        raise NotImplementedError(f"attention with {asked[0]}")
    # (1, H, T, D) -> (T, H, D)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    out = step.attend(module.layer_idx, q, k, v, kwargs.get("scaling"), kwargs.get("sliding_window"))
    return out[None], None  # (T, H, D) -> (1, T, H, D)


def _repeated(states: Tensor, n: int) -> Tensor:
    """`(tokens, H', D)` -> `(1, H' n, tokens, D)`."""
    states = states.transpose(0, 1)[None]
    return states if n == 1 else states.repeat_interleave(n, dim=1)


def _seen(distance: Tensor, window: int | None) -> Tensor:
    """Whether a token sees another that comes so many places before it."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `allowed`, else the least value: finite, so that what it is added to stays a number."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)
