"""The check of generated weights before anyone uses them.

Generated weights are never trusted: finite, of a size like the generator's mean, and on the resident base, where there
is one, they must move next-token probabilities, not wreck them. The probe is one small forward of a sentence no task is
made of: what an adapter does to its own prompts is its business. The base's side of it is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dnd_sdk.engine import Resident
    from dnd_sdk.lora import LoraLayout

PROBE = "The short answer to your question is that it"
PROBE_TOKENS = 8
"""Of `PROBE` at most, whatever the base's tokenizer makes of it: the cost of the check."""


@dataclass(frozen=True)
class Limits:
    """Bounds that generated weights must keep."""

    norm_ratio: tuple[float, float] = (0.05, 20.0)
    """Allowed norm, relative to the norm of the generator's mean output."""
    max_kl: float = 12.0
    """Mean KL divergence (nats) of adapted from base next-token probabilities over the probe's tokens."""


class Vetting:
    """Judges weights for one base."""

    def __init__(self, layout: LoraLayout, limits: Limits, resident: Resident | None) -> None:
        """`resident`: the base they are tried on; None: it is out of reach, and the weights alone are judged."""
        self._layout, self._limits = layout, limits
        self._probe = None if resident is None else Probe(resident)

    @property
    def probes(self) -> bool:
        """Whether weights are tried on the base."""
        return self._probe is not None

    def complaint(self, flat: Tensor, usual: Tensor) -> str | None:
        """Why these weights must not be used, or None. Both are flat LoRA vectors; `usual` has a usual size."""
        self._layout.check_size(flat.numel())
        if not torch.isfinite(flat).all():
            return "the generated weights are not finite"
        size, usual_size = flat.norm().item(), usual.norm().item()
        if size == 0.0:
            return "the generated weights are all zero"
        ratio = size / usual_size if usual_size > 0.0 else 1.0  # a generator without a shared adapter has no usual norm
        low, high = self._limits.norm_ratio
        if not low <= ratio <= high:
            return f"the generated weights have {ratio:.3g} times the usual norm, allowed is {low} to {high}"
        if self._probe is None:
            return None
        kl, most = self._probe.kl(flat), self._limits.max_kl
        if not kl <= most:  # also catches NaN
            return f"the generated weights derail the base: KL {kl:.3g} nats, allowed is {most}"
        return None


class Probe:
    """One short sentence that a base reads with and without weights."""

    def __init__(self, resident: Resident) -> None:
        self._resident = resident

    def kl(self, flat: Tensor) -> float:
        """Mean KL(adapted || base) in nats over its tokens; `flat` `(P,)`."""
        plain = self._plain  # first: it needs a turn of its own
        with self._resident.trying(flat):
            adapted = self._log_probs()
        return float((adapted.exp() * (adapted - plain)).sum(-1).mean())

    @cached_property
    def _plain(self) -> Tensor:
        with self._resident.running([None]):
            return self._log_probs()

    def _log_probs(self) -> Tensor:
        """Next-token log-probabilities `(T, V)`, with whatever adapter is in use."""
        model = self._resident.base.model
        ids = torch.tensor([self._ids], device=model.device)
        return model(input_ids=ids).logits[0].float().log_softmax(-1)

    @cached_property
    def _ids(self) -> list[int]:
        tokenizer = self._resident.base.tokenizer
        ids: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"][:PROBE_TOKENS]
        return ids or [tokenizer.eos_token_id]
