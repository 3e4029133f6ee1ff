"""The resident base: one model, its slots of adapters, and whose turn it is to run it.

Whoever runs the model does so inside `running`, `forwarding` or `trying`, one at a time; work of several forwards lets
the others in between by `turn.step()`. A turn within a turn of the same thread would wait for itself.

Which adapter a forward uses travels with the work (a lease and a context variable), so threads never race for it. Where
all rows use the base, the plain model runs: bit-identical, no overhead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dnd_sdk.chat import Messages, Tools, prompt_ids
from dnd_sdk.engine.bank import Fetch, IsStored, SlotBank
from dnd_sdk.engine.turns import Turn, Turns
from dnd_sdk.errors import ContextLengthError, shown
from dnd_sdk.lora import LoraLayout, SegmentedLora, TokenSegment, attach_lora, using
from dnd_sdk.machine import available_bytes
from dnd_sdk.models import Base

MANY_SLOTS = 64
"""Adapters that are kept in slots where nobody says how many."""


class Resident:
    """A base with LoRA attached; thread-safe."""

    def __init__(
        self,
        base: Base,
        layout: LoraLayout,
        *,
        n_slots: int | None = None,
        kept_bytes: int | None = None,
        fetch: Fetch | None = None,
        is_stored: IsStored | None = None,
    ) -> None:
        """`n_slots` adapters of `layout` can be in the bank at once, None: `MANY_SLOTS`, or what an eighth of the free
        memory holds; those that lose their slot are kept in `kept_bytes` of the host's, None: in another eighth.
        `fetch` and `is_stored` as for `SlotBank`.
        """
        self.base, self.layout = base, layout
        self.bank = SlotBank(
            layout,
            n_slots or default_slots(base, layout),
            base.model.device,
            slot_dtype(base),
            fetch=fetch,
            is_stored=is_stored,
            kept_bytes=available_bytes() // 8 if kept_bytes is None else kept_bytes,
        )
        self.turns = Turns()
        attach_lora(base.model, layout)

    @property
    def context_tokens(self) -> int:
        """Prompt and completion together cannot be longer (the base's context)."""
        return int(getattr(self.base.model.config.get_text_config(), "max_position_embeddings", 2**31))

    def prompt_ids(self, messages: Messages, n_new: int, tools: Tools | None = None) -> list[int]:
        """Token ids of the templated chat; `ContextLengthError` unless `n_new` more tokens fit the base's context."""
        ids = prompt_ids(self.base.tokenizer, messages, tools)
        if n_new >= self.context_tokens:
            raise ContextLengthError(
                f"{shown(n_new)} tokens are kept for the answer, at most {self.context_tokens - 1} fit beside a prompt",
                fix="lower max_new_tokens, or shorten the answer to score",
            )
        if len(ids) + n_new > self.context_tokens:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, at most {self.context_tokens - n_new} fit "
                f"(context {self.context_tokens}, {n_new} kept for the answer)",
                fix="shorten the prompt or lower max_new_tokens",
            )
        return ids

    @contextmanager
    def running(self, adapter_ids: Sequence[str | None]) -> Iterator[Turn]:
        """Inside, this thread alone uses the model and its forwards apply these adapters per row."""
        with self.bank.lease(adapter_ids) as rows, self.forwarding(rows) as turn:
            yield turn

    @contextmanager
    def forwarding(self, rows: tuple[int, ...] | int) -> Iterator[Turn]:
        """The same for bank rows that are leased already, as `SlotBank.lease` yields them."""
        with self.turns.take() as turn, torch.inference_mode(), using(self.bank.adapted(rows)):
            yield turn

    @contextmanager
    def trying(self, flat: Tensor) -> Iterator[Turn]:
        """The same for weights `(P,)` that are in no slot: every row of this thread's forwards uses them."""
        packing = self.bank.packing
        self.layout.check_size(flat.numel())
        with self.turns.take() as turn, torch.inference_mode():
            packed = torch.empty_like(self.bank.packed(0))
            packing.pack(flat.to(packed.device), packed)
            with using(SegmentedLora(packing, [TokenSegment(1, packing.views(packed))], per_row=True)):
                yield turn

    def rounds(self, adapter_ids: Sequence[str | None]) -> list[int]:
        """Which round of the slots each row is best run in, so that every adapter is brought in once.

        Adapters that fit the slots together share a round; the base needs none and goes with the first.
        """
        distinct = list(dict.fromkeys(i for i in adapter_ids if i is not None))
        at_once = max(1, self.bank.room(()))
        turn: dict[str | None, int] = {i: n // at_once for n, i in enumerate(distinct)}
        return [turn.get(i, 0) for i in adapter_ids]

    def fits_slots(self, adapter_ids: Sequence[str | None]) -> bool:
        """Whether one batch may use all these adapters."""
        wanted = {i for i in adapter_ids if i is not None}
        return len(wanted) <= self.bank.room(wanted)


def slot_dtype(base: Base) -> torch.dtype:
    """In which precision a base's adapters are kept and applied."""
    # beside a bfloat16 base on a CPU: small products are several times faster there in float32
    return torch.float32 if base.model.device.type == "cpu" else base.model.dtype


def default_slots(base: Base, layout: LoraLayout) -> int:
    """How many adapters of a layout are kept in slots where nobody says how many."""
    row_bytes = layout.n_parameters * slot_dtype(base).itemsize
    return max(1, min(MANY_SLOTS, free_bytes(base.model.device) // 8 // row_bytes - 1))


def free_bytes(device: torch.device) -> int:
    """Memory of a device that can still be had."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
