"""How an adapter lies in memory while it serves: matrices with the same input side by side, B as decoding reads it.

* q, k and v of a layer share one A product, gate and up another: their A matrices are one `(n r, in)`.
* Each B is stored transposed, `(r, out)`, with the layout's scaling folded in.
* Layers are alike, so a flat vector is packed by one strided copy per matrix of a layer, for all layers at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from dnd_sdk.lora.layout import LoraLayout, LoraModule

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one module that are given the same states, in the models of transformers."""

_LAYER = re.compile(r".*?\.\d+\.")


class GroupViews(NamedTuple):
    """One group of an adapter, or of several stacked ones."""

    A: Tensor
    """`(..., in, n r)`: the A matrices of the group's n modules side by side, transposed."""
    B: tuple[Tensor, ...]
    """Per module `(..., r, out)`, scaled."""


class Place(NamedTuple):
    """Where a module's matrices are found."""

    group: int
    member: int


class Packing:
    """The memory order of one layout's packed vectors `(P,)`."""

    def __init__(self, layout: LoraLayout) -> None:
        self.layout = layout
        self.groups = tuple(_groups(layout.modules))
        """Modules with one A product."""
        self.places = {m.name: Place(g, i) for g, group in enumerate(self.groups) for i, m in enumerate(group)}

    def views(self, packed: Tensor) -> tuple[GroupViews, ...]:
        """The groups of packed vectors `(..., P)`, as views."""
        out, at, r, lead = [], 0, self.layout.r, packed.shape[:-1]
        for group in self.groups:
            n, width = len(group), group[0].in_features
            A = packed[..., at : at + n * r * width].view(*lead, n * r, width)
            at += n * r * width
            Bs = []
            for module in group:
                Bs.append(packed[..., at : at + r * module.out_features].view(*lead, r, module.out_features))
                at += r * module.out_features
            out.append(GroupViews(A.transpose(-1, -2), tuple(Bs)))
        return tuple(out)

    def pack(self, flat: Tensor, out: Tensor) -> None:
        """Write the flat vector `(P,)` into the packed vector `(P,)` of the same device, in its dtype."""
        r, scaling = self.layout.r, self.layout.scaling
        for start, n_layers, groups in self._blocks:
            size = sum(_size(module, r) for group in groups for module in group)
            source = flat[start : start + n_layers * size].view(n_layers, size)  # (L P',) -> (L, P')
            target = out[start : start + n_layers * size].view(n_layers, size)
            read = write = 0
            for group in groups:
                at = write + sum(r * module.in_features for module in group)  # the Bs follow the As
                for module in group:
                    n_in, n_out = r * module.in_features, r * module.out_features
                    target[:, write : write + n_in].copy_(source[:, read : read + n_in])
                    B = source[:, read + n_in : read + n_in + n_out].view(n_layers, module.out_features, r)
                    # (L, out, r) -> (L, r, out)
                    slot = target[:, at : at + n_out].view(n_layers, r, module.out_features)
                    torch.mul(B.transpose(1, 2), scaling, out=slot)
                    read, write, at = read + n_in + n_out, write + n_in, at + n_out
                write = at

    @cached_property
    def _blocks(self) -> list[tuple[int, int, list[tuple[LoraModule, ...]]]]:
        """(start in the vector, number of layers, the groups of one) for each run of layers that are alike."""
        layers = [list(groups) for _, groups in groupby(self.groups, key=lambda group: _layer(group[0].name))]
        blocks, at = [], 0
        for _, alike in groupby(layers, key=_shapes):
            run = list(alike)
            blocks.append((at, len(run), run[0]))
            at += sum(_size(module, self.layout.r) for layer in run for group in layer for module in group)
        return blocks


def _groups(modules: Sequence[LoraModule]) -> Iterator[tuple[LoraModule, ...]]:
    """Neighbours of the flat order that share their input, everything else alone."""
    group: list[LoraModule] = []
    for module in modules:
        if group and not _share_input([*group, module]):
            yield tuple(group)
            group = []
        group.append(module)
    if group:
        yield tuple(group)


def _share_input(modules: Sequence[LoraModule]) -> bool:
    parents = {m.name.rpartition(".")[0] for m in modules}
    names = {m.name.rpartition(".")[2] for m in modules}
    alike = len(parents) == 1 and len({m.in_features for m in modules}) == 1
    return alike and any(names <= set(shared) for shared in SHARED_INPUT)


def _layer(name: str) -> str:
    found = _LAYER.match(name)
    return found[0] if found else ""


def _shapes(layer: Sequence[Sequence[LoraModule]]) -> list[list[tuple[int, int]]]:
    return [[(m.in_features, m.out_features) for m in group] for group in layer]


def _size(module: LoraModule, r: int) -> int:
    return r * (module.in_features + module.out_features)
