"""LoRA matrices as a grid of weight tokens, and back (arXiv 2506.16406, released code).

* Each matrix is cut along its long side (the one that is not r) into equal chunks; a chunk is one token `(H, W)`.
* A chunk is standardised; its mean and std stand in the token's border: the last two rows and columns hold
  `mean * 8` and `log(0.9 * std + 0.1) + 1.6`, and are read back as averages over their cells.
* Cells that belong to no weight are NaN in targets (masked out of the loss) and ignored when decoding.
* Derived from the layout alone: `r + BORDER` rows, and a width that wastes few cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from dnd_sdk.lora import LoraLayout

BORDER = 2
"""Rows and columns of scale cells per token."""
_MAX_CHUNK = 256
_EPS = 1e-12


class WeightTokenizer:
    """Exact, differentiable map between flat LoRA vectors and weight tokens for the chosen parts of a layout."""

    def __init__(self, layout: LoraLayout, parts: Sequence[str] = ("lora_A", "lora_B")) -> None:
        self.layout = layout
        self.parts = tuple(parts)
        segments = [s for s in layout.segments if s.part in self.parts]
        lengths = [max_side(s.shape, s.part) for s in segments]
        self.chunk = chunk_width(lengths)
        self.H, self.W = layout.r + BORDER, self.chunk + BORDER
        self.T = sum(math.ceil(n / self.chunk) for n in lengths)
        # cell -> position in the flat vector, -1 where a cell carries no weight
        self.cells = torch.cat([self._cells(s.start, s.shape, s.part) for s in segments])  # (T, r, chunk)
        self.used = self.cells >= 0
        self._source = self.cells[self.used]  # (n weights,) places in the flat vector
        self._filled = self.used.flatten().nonzero()[:, 0]  # (n weights,) places among all cells

    def _cells(self, start: int, shape: tuple[int, int], part: str) -> Tensor:
        at = torch.arange(shape[0] * shape[1]).view(shape) + start
        rows = at if part == "lora_A" else at.T  # (r, n): the rank runs down, the long side across
        n = rows.shape[1]
        n_chunks = math.ceil(n / self.chunk)
        per = math.ceil(n / n_chunks)  # equal chunks, the last one at most n_chunks - 1 shorter
        out = torch.full((n_chunks, self.layout.r, self.chunk), -1)
        for i, piece in enumerate(rows.split(per, dim=1)):
            out[i, :, : piece.shape[1]] = piece
        return out

    def tokenise(self, flat: Tensor) -> Tensor:
        """Flat vectors `(..., P)` to tokens `(..., T, H, W)` with NaN in unused cells."""
        self.layout.check_size(flat.shape[-1])
        used = self.used.to(flat.device)
        values = torch.where(used, flat[..., self.cells.clamp(min=0).to(flat.device)], 0.0)  # (..., T, r, chunk)
        n = used.sum((-2, -1), keepdim=True)  # (T, 1, 1), as mean and std (..., T, 1, 1): one a token
        mean = values.sum((-2, -1), keepdim=True) / n
        std = (torch.where(used, values - mean, 0.0).square().sum((-2, -1), keepdim=True) / n).sqrt()
        body = torch.where(used, (values - mean) / (std + _EPS), torch.nan)
        tokens = torch.full((*flat.shape[:-1], self.T, self.H, self.W), torch.nan, device=flat.device, dtype=flat.dtype)
        tokens[..., :-BORDER, :-BORDER] = body
        tokens[..., -BORDER:, :] = mean * 8
        tokens[..., :-BORDER, -BORDER:] = torch.log(0.9 * std + 0.1) + 1.6
        return tokens

    def detokenise(self, tokens: Tensor) -> Tensor:
        """Tokens `(..., T, H, W)` to flat vectors `(..., P)`; parts not tokenised are zero. Differentiable."""
        mean = tokens[..., -BORDER:, :].mean((-2, -1), keepdim=True) / 8  # (..., T, 1, 1), and so the std
        log_std = tokens[..., :-BORDER, -BORDER:].mean((-2, -1), keepdim=True)
        std = (torch.exp(log_std - 1.6) - 0.1) / 0.9
        body = tokens[..., :-BORDER, :-BORDER] * (std + _EPS) + mean  # (..., T, r, chunk)
        flat = torch.zeros((*tokens.shape[:-3], self.layout.n_parameters), device=tokens.device, dtype=tokens.dtype)
        # (..., T r chunk) -> (..., n weights) -> (..., P)
        values = body.flatten(-3).index_select(-1, self._filled.to(tokens.device))
        return flat.index_copy(-1, self._source.to(tokens.device), values)


def max_side(shape: tuple[int, int], part: str) -> int:
    """Length of the side that is not the rank."""
    return shape[1] if part == "lora_A" else shape[0]


def chunk_width(lengths: Sequence[int]) -> int:
    """Columns per token: the lengths' greatest common divisor if it is a usable width, else what wastes least.

    Usable is 64..256; shorter matrices than 64 get one token as wide as the longest of them.
    """
    longest = max(lengths)
    common = reduce(math.gcd, lengths)
    if 64 <= common <= _MAX_CHUNK:
        return common
    candidates = range(min(64, longest), min(_MAX_CHUNK, longest) + 1)
    return min(candidates, key=lambda w: (sum(math.ceil(n / w) * w for n in lengths), -w))
