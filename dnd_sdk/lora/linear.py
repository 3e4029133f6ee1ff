"""Per-row LoRA on a resident model, chosen by the caller's context and never by global state.

* `attach_lora` wraps the forward of the layout's Linears; the model's modules, names and weights stay untouched.
* `use_lora(tables, rows)` sets, for this thread (or task) only, which adapter each batch row uses: no "active adapter"
  that two requests could race for.
* One adapter for all rows: two GEMMs. Several: gather + bmm, whose cost does not depend on how many adapters there are.
* Differentiable in the tables, so serving (slot bank) and training (parameters, generator output) share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnd_sdk.lora.layout import LoraLayout

Tables = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> (A `(S, r, in)`, B `(S, out, r)` with the scaling folded in)."""


@dataclass(frozen=True)
class LoraRows:
    """Which of the S adapters in `tables` each batch row uses."""

    tables: Tables
    rows: Tensor | int
    """An int: all rows use that adapter. A long tensor `(B,)`: one adapter per row."""
    uniform: Tables | None
    """For an int: module name -> (A `(in, r)`, B `(r, out)`), cut out once per block instead of once per forward."""


_active: ContextVar[LoraRows | None] = ContextVar("dnd_lora_rows", default=None)


@contextmanager
def use_lora(tables: Tables, rows: Tensor | int) -> Iterator[None]:
    """Apply adapters to every forward of an attached model inside this block, in this context only."""
    # A (S, r, in) -> (in, r) and B (S, out, r) -> (r, out) of the one adapter
    uniform = {n: (A[rows].T, B[rows].T) for n, (A, B) in tables.items()} if isinstance(rows, int) else None
    token = _active.set(LoraRows(tables, rows, uniform))
    try:
        yield
    finally:
        _active.reset(token)


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
        out = plain(x)
        active = _active.get()
        if active is None or name not in active.tables:
            return out
        if active.uniform is not None:
            return _uniform(out, x, *active.uniform[name])
        A, B = active.tables[name]
        return _gathered(out, x, A[active.rows], B[active.rows])  # (S, ...) -> (B, ...): each row's own adapter

    forward.dnd_lora = True  # type: ignore[attr-defined]
    return forward


def _uniform(out: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    # A (in, r), B (r, out); a Linear's result is its own, so inference adds in place: no copy of `out` per token.
    # mm, since the linear of torch transposes and reshapes anew on every call
    low = torch.mm(x.reshape(-1, x.shape[-1]), A)  # (B, T, in) -> (B T, r)
    if torch.is_grad_enabled() or not out.is_contiguous():
        return torch.addmm(out.flatten(0, -2), low, B).view_as(out)  # (B T, out) -> (B, T, out)
    out.view(-1, out.shape[-1]).addmm_(low, B)
    return out


def _gathered(out: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    # x (B, T, in), A (B, r, in), B (B, out, r): (B, T, in) -> (B, T, r) -> (B, T, out)
    return torch.baddbmm(out, torch.bmm(x, A.transpose(1, 2)), B.transpose(1, 2))
