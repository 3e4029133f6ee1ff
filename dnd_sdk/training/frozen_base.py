"""The base while it is trained on: its weights as they are, LoRA attached, gradients to the adapters alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dnd_sdk.config import Home
from dnd_sdk.lora import LoraLayout, attach_lora, tables_from_flat, use_lora
from dnd_sdk.models import Base, load_base
from dnd_sdk.training.batches import TokenRow, answer_loss, micro_batches
from dnd_sdk.training.int8_base import quantize_frozen_linears
from dnd_sdk.training.settings import Precision, RunSettings


@dataclass(frozen=True)
class FrozenBase:
    """A base model that answers task rows under adapters."""

    model: PreTrainedModel
    layout: LoraLayout
    name: str
    fingerprint: str
    precision: Precision
    """How it computes while training."""
    pad: int
    """Token id behind the end of shorter rows."""
    micro_tokens: int
    """Padded tokens that go through it at once."""

    @classmethod
    def of(cls, base: Base, layout: LoraLayout, run: RunSettings) -> FrozenBase:
        """Attach the LoRA of `layout` to `base`, and its int8 products where `run` asks for them."""
        if run.base_precision == "int8":
            quantize_frozen_linears(base.model, layout)
        attach_lora(base.model, layout)
        pad, end = base.tokenizer.pad_token_id, base.tokenizer.eos_token_id
        return cls(
            model=base.model,
            layout=layout,
            name=base.name,
            fingerprint=base.fingerprint,
            precision=run.base_precision,
            pad=end if pad is None else pad,
            micro_tokens=run.micro_tokens,
        )

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return next(self.model.parameters()).device

    @property
    def n_parameters(self) -> int:
        """Its own weights."""
        return sum(p.numel() for p in self.model.parameters())

    def half(self) -> torch.autocast:
        """Where the decoder computes in bfloat16, too: on a CPU, where the base does."""
        on = self.precision == "bfloat16" and self.device.type == "cpu"
        return torch.autocast("cpu", torch.bfloat16, enabled=on)

    def backward(self, adapters: Tensor, rows: list[tuple[TokenRow, int]]) -> float:
        """Add the gradient of one step's answer loss to what made `adapters` (S, P); return the loss.

        Micro-batches sum their gradient in a detached copy, so the graph behind `adapters` is walked once.
        """
        leaf = adapters.detach().requires_grad_()
        total = 0.0
        for loss in self._losses(leaf, rows):
            loss.backward()
            total += loss.item()
        adapters.backward(leaf.grad)
        return total

    @torch.no_grad()
    def loss(self, adapters: Tensor, rows: list[tuple[TokenRow, int]]) -> float:
        """The mean answer loss of `rows`, each under its adapter of `adapters` (S, P); no gradient."""
        return sum(loss.item() for loss in self._losses(adapters, rows))

    def _losses(self, adapters: Tensor, rows: list[tuple[TokenRow, int]]) -> Iterator[Tensor]:
        for batch in micro_batches(rows, max_padded=self.micro_tokens, pad=self.pad):
            one = adapters.shape[0] == 1
            tables = tables_from_flat(self.layout, adapters.to(self.model.dtype))  # of a base in bfloat16, too
            with use_lora(tables, 0 if one else batch.owner.to(self.device)):
                yield answer_loss(self.model, batch)


def load_for_training(name: str, home: Home, run: RunSettings) -> Base:
    """The base as `run` computes with it; no LoRA yet."""
    half = run.base_precision == "bfloat16"
    base = load_base(name, home, device=run.device, dtype="bfloat16" if half else "auto")
    if half and base.model.device.type == "cpu":
        base.model.set_attn_implementation("eager")  # torch's fused attention walks back four times slower there
    return base
