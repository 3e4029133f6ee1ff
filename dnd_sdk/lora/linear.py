"""LoRA on a resident model, chosen by the caller's context and never by global state.

* `attach_lora` wraps the forward of the layout's Linears; the model's modules, names and weights stay untouched.
* `using(adapted)` sets, for this thread (or task) only, what is added to them: no "active adapter" that two requests
  could race for. `use_lora(tables, rows)` is the differentiable way, for training and by hand; `SegmentedLora` serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor, nn

from dnd_sdk.lora.layout import LoraLayout

Tables = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> (A `(S, r, in)`, B `(S, out, r)` with the scaling folded in)."""


class Adapted(Protocol):
    """What changes the outputs of a model's Linears."""

    def add(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """The output of module `name`, whose own is `out` `(..., out)` for the input `x` `(..., in)`."""


_active: ContextVar[Adapted | None] = ContextVar("dnd_adapted", default=None)


@contextmanager
def using(adapted: Adapted | None) -> Iterator[None]:
    """Apply `adapted` (None: nothing) to every forward of an attached model inside this block, in this context only."""
    token = _active.set(adapted)
    try:
        yield
    finally:
        _active.reset(token)


@contextmanager
def use_lora(tables: Tables, rows: Tensor | Sequence[int] | int) -> Iterator[None]:
    """Apply the adapters `rows` of `tables`, differentiable in the tables.

    `rows`: an int is one adapter for all batch rows, several ints or a long tensor `(B,)` one per batch row.
    """
    with using(_Uniform(tables, rows) if isinstance(rows, int) else _Gathered(tables, torch.as_tensor(rows))):
        yield


class _Uniform:
    """One adapter for all rows."""

    def __init__(self, tables: Tables, row: int) -> None:
        # A (S, r, in) -> (in, r) and B (S, out, r) -> (r, out) of the one adapter
        self._tables = {n: (A[row].T, B[row].T) for n, (A, B) in tables.items()}

    def add(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        if name not in self._tables:
            return out
        A, B = self._tables[name]
        low = torch.mm(x.reshape(-1, x.shape[-1]), A)  # (B, T, in) -> (B T, r)
        return torch.addmm(out.flatten(0, -2), low, B).view_as(out)  # (B T, out) -> (B, T, out)


class _Gathered:
    """One adapter per row."""

    def __init__(self, tables: Tables, rows: Tensor) -> None:
        self._tables, self._rows = tables, rows

    def add(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        if name not in self._tables:
            return out
        A, B = (table[self._rows] for table in self._tables[name])  # (S, ...) -> (B, ...): each row's own
        # x (B, T, in), A (B, r, in), B (B, out, r): (B, T, in) -> (B, T, r) -> (B, T, out)
        return torch.baddbmm(out, torch.bmm(x, A.transpose(1, 2)), B.transpose(1, 2))


def tables_from_flat(layout: LoraLayout, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Split stacked flat vectors `(S, P)` into tables; differentiable, scaling folded into B."""
    views = list(layout.views(flat))  # (S, P) -> A (S, r, in), B (S, out, r), by turns
    return {a.module: (A, B * layout.scaling) for (a, A), (_, B) in zip(views[::2], views[1::2], strict=True)}


def attach_lora(model: nn.Module, layout: LoraLayout) -> None:
    """Wrap every Linear of `layout`; without `use_lora` the model computes exactly what it did before.

    A Linear that is wrapped already is left alone: wrapped twice it would add its LoRA twice.
    """
    modules = dict(model.named_modules())
    for m in layout.modules:
        module = modules[m.name]
        if not hasattr(module.forward, "dnd_lora"):
            # not a forward hook: hooks send every call of the module through a slower path, which decoding feels
            module.forward = _with_lora(module.forward, m.name)  # type: ignore[assignment]


def _with_lora(plain: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out, adapted = plain(x), _active.get()
        return out if adapted is None else adapted.add(name, x, out)

    forward.dnd_lora = True  # type: ignore[attr-defined]
    return forward
