"""What tests of a session compare: what the base says, and everything an adaptation may change."""

from __future__ import annotations

from typing import Any

import torch

from dnd_sdk.session import DnD


def logits(dnd: DnD, adapter_id: str | None = None) -> torch.Tensor:
    """Next-token logits of the resident base, with an adapter of its bank."""
    ids = torch.tensor([dnd.base.tokenizer("hello there")["input_ids"]])
    with dnd.engine.running([adapter_id]):
        return dnd.base.model(input_ids=ids).logits.clone()


def state(dnd: DnD) -> tuple[Any, ...]:
    """Everything an adaptation may change."""
    return sorted(a.name for a in dnd.store.ls()), dnd.engine.bank.resident(), dnd.store.verify()


class Interrupt:
    """Raises when called the n-th time, before or after doing the real thing."""

    def __init__(self, real: Any, error: BaseException, *, after: bool) -> None:
        self.real, self.error, self.after = real, error, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.after:
            self.real(*args, **kwargs)
        raise self.error
