"""The cascaded hyper-convolution decoder of Drag-and-Drop LLMs (arXiv 2506.16406), as plain modules.

* Knows nothing of text or LoRA: it maps `(B, N, L, C)` to the last shape of a list of `(N, L, C)` shapes.
* Every convolution is k x k, stride 1, "same"; each treats one of the three axes as channels and the other two as
  the image, so one layer changes all three sizes.
* Equal, weight for weight, to the module released with the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]
"""(N, L, C): prompts, text tokens, width; at the end (T, H, W): weight tokens and their grid."""


class _AxisPair(nn.Module):
    """Two bias-free convolutions that change C (`width`) and L (`height`), in the order the name says."""

    def __init__(self, before: Shape, after: Shape, k: int, *, width_first: bool) -> None:
        super().__init__()
        _, L, C = before
        _, L2, C2 = after
        self.width_first = width_first
        self.width = nn.Parameter(_conv_weight(C2, C, k))
        self.height = nn.Parameter(_conv_weight(L2, L, k))

    def forward(self, x: Tensor) -> Tensor:
        if self.width_first:
            return self._change_height(self._change_width(x))
        return torch.tanh(self._change_width(self._change_height(x)))

    def _change_width(self, x: Tensor) -> Tensor:
        # (B, N, L, C) -> image (L, N) with C channels -> (B, N, L, C')
        return nn.functional.conv2d(x.permute(0, 3, 2, 1), self.width, padding="same").permute(0, 3, 2, 1)

    def _change_height(self, x: Tensor) -> Tensor:
        # (B, N, L, C) -> image (N, C) with L channels -> (B, N, L', C)
        return nn.functional.conv2d(x.permute(0, 2, 1, 3), self.height, padding="same").permute(0, 2, 1, 3)


class HyperConvLayer(nn.Module):
    """One hyper-convolution `(N, L, C) -> (N', L', C')`; residual when the two shapes are equal."""

    def __init__(self, before: Shape, after: Shape, kernel_size: int) -> None:
        super().__init__()
        self.residual = before == after
        self.norm = nn.LayerNorm(before[1:])
        self.width_first = _AxisPair(before, after, kernel_size, width_first=True)
        self.height_first = _AxisPair(before, after, kernel_size, width_first=False)
        bound = 1.0 / (after[1] * after[2])
        self.bias = nn.Parameter(torch.empty(after[1:]).uniform_(-bound, bound))
        self.layerwise = nn.Conv2d(before[0], after[0], kernel_size, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, N, L, C)` to `(B, N', L', C')`."""
        h = self.norm(x)
        h = (self.width_first(h) + self.height_first(h) + self.bias) / 3  # (B, N, L, C) -> (B, N, L', C')
        h = self.layerwise(h)  # image (L', C') with N channels: (B, N, L', C') -> (B, N', L', C')
        return x + h if self.residual else h


class HyperConvDecoder(nn.Module):
    """A cascade of hyper-convolutions through `shapes`."""

    def __init__(self, shapes: Sequence[Shape], kernel_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HyperConvLayer(a, b, kernel_size) for a, b in pairwise(shapes))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, *shapes[0])` to `(B, *shapes[-1])`."""
        for layer in self.layers:
            x = layer(x)
        return x


def _conv_weight(out_channels: int, in_channels: int, k: int) -> Tensor:
    # torch's own Conv2d initialisation
    weight = torch.empty(out_channels, in_channels, k, k)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight
