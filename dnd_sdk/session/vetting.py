"""The check of generated weights before anyone uses them.

Generated weights are never trusted: finite, of a size like the generator's mean, and on the resident base they must
move next-token probabilities, not wreck them. The probe is one small forward: few prompts and tokens, last logits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch  # noqa: TID253 - row 5 shares torch
from torch import Tensor  # noqa: TID253

from dnd_sdk.lora_linear import tables_from_flat, use_lora

if TYPE_CHECKING:
    from dnd_sdk.lora_layout import LoraLayout
    from dnd_sdk.models import Base


@dataclass(frozen=True)
class Limits:
    """Bounds that generated weights must keep."""

    norm_ratio: tuple[float, float] = (0.05, 20.0)
    """Allowed norm, relative to the norm of the generator's mean output."""
    max_kl: float = 12.0
    """Mean KL divergence (nats) of adapted from base next-token probabilities over the probe prompts."""
    probe_prompts: int = 2
    probe_tokens: int = 8
    """Tokens read of each probe prompt."""


def complaint(
    flat: Tensor, mean: Tensor, base: Base, layout: LoraLayout, prompts: Sequence[str], limits: Limits
) -> str | None:
    """Why these generated weights must not be used, or None. `flat` and `mean` are flat LoRA vectors."""
    layout.check_size(flat.numel())
    if not torch.isfinite(flat).all():
        return "the generated weights are not finite"
    size, usual = flat.norm().item(), mean.norm().item()
    if size == 0.0:
        return "the generated weights are all zero"
    ratio = size / usual if usual > 0.0 else 1.0  # a generator without a shared adapter has no usual norm
    low, high = limits.norm_ratio
    if not low <= ratio <= high:
        return f"the generated weights have {ratio:.3g} times the usual norm, allowed is {low} to {high}"
    kl = probe_kl(flat, base, layout, prompts[: limits.probe_prompts], limits.probe_tokens)
    if not kl <= limits.max_kl:  # also catches NaN
        return f"the generated weights derail the base: KL {kl:.3g} nats, allowed is {limits.max_kl}"
    return None


@torch.inference_mode()
def probe_kl(flat: Tensor, base: Base, layout: LoraLayout, prompts: Sequence[str], n_tokens: int) -> float:
    """Mean KL(adapted || base) in nats at the last position of each prompt; both in one batch."""
    tokenizer, model = base.tokenizer, base.model
    rows = [tokenizer(p, add_special_tokens=False)["input_ids"][:n_tokens] or [tokenizer.eos_token_id] for p in prompts]
    width = max(map(len, rows))
    fill = tokenizer.pad_token_id or 0
    ids = torch.tensor([[fill] * (width - len(r)) + r for r in rows]).repeat(2, 1)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]).repeat(2, 1)
    device, dtype = model.device, model.dtype
    both = torch.stack([torch.zeros_like(flat), flat]).to(device, dtype)
    which = torch.arange(2, device=device).repeat_interleave(len(rows))
    with use_lora(tables_from_flat(layout, both), which):
        out = model(input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=1)
    logp_base, logp_adapted = out.logits[:, -1].float().log_softmax(-1).chunk(2)
    return float((logp_adapted.exp() * (logp_adapted - logp_base)).sum(-1).mean())
