"""Several adapters into one: the weighted sum of their weight changes, `sum_i w_i * scaling * B_i @ A_i` per module.

* Where all share A, as the adapters of one zoo do, the sum of the B matrices is exact.
* Otherwise the sum has a higher rank than a slot holds: the nearest matrix of rank r takes its place (truncated SVD,
  done on the small factors), and what that loses is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dnd_sdk.errors import ConfigError
from dnd_sdk.lora.layout import LoraLayout


def merge_flats(flats: Sequence[Tensor], weights: Sequence[float], layout: LoraLayout) -> tuple[Tensor, float]:
    """The merged flat vector, and the share of the sum's squared norm that fits into its rank (1.0: exact).

    `flats` are vectors of `layout`, one weight each. Raises `ConfigError` when they do not pair up or there are none.
    """
    if not flats or len(flats) != len(weights):
        raise ConfigError(f"merging needs one weight per adapter, got {len(flats)} and {len(weights)}")
    factors = torch.tensor(weights, dtype=torch.float32)[:, None, None]
    merged = torch.zeros(layout.n_parameters)
    whole = kept = 0.0
    parts, slots = list(layout.views(torch.stack(list(flats)))), list(layout.views(merged))
    for i in range(0, len(parts), 2):
        (_, A), (_, B) = parts[i : i + 2]  # (n, r, in), (n, out, r)
        (_, a), (_, b) = slots[i : i + 2]
        if torch.equal(A, A[:1].expand_as(A)):
            a.copy_(A[0])
            b.copy_((factors * B).sum(0))
            squares = (b.T @ b * (a @ a.T)).sum().clamp(min=0)[None]
        else:
            squares = _truncate(A, factors * B, a, b)
        whole += float(squares.sum())
        kept += float(squares[: layout.r].sum())
    return merged, kept / whole if whole > 0.0 else 1.0


def merge_sharing_a(load: Callable[[str], Tensor], weights: Mapping[str, float], layout: LoraLayout) -> Tensor:
    """The weighted sum of named adapters with one A, exact; `load` gives their flat vectors, one in memory at a time.

    Raises `ConfigError` naming two whose A differs by more than a rounding.
    """
    first_name = next(iter(weights))
    first = load(first_name)
    merged = torch.zeros_like(first)
    for name, weight in weights.items():
        flat = load(name)
        merged += weight * flat
        for (segment, A), (_, other) in zip(layout.views(first), layout.views(flat), strict=True):
            # within a rounding: A is a mean over equal snapshots
            if segment.part == "lora_A" and not torch.allclose(A, other, rtol=1e-5, atol=1e-7):
                raise ConfigError(f"adapters {first_name!r} and {name!r} have different A: B means nothing")
    for (segment, A), (_, slot) in zip(layout.views(first), layout.views(merged), strict=True):
        if segment.part == "lora_A":
            slot.copy_(A)
    return merged


def _truncate(A: Tensor, B: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Fill a `(r, in)` and b `(out, r)` with the best factors of `sum_i B_i @ A_i`; its squared singular values."""
    q_out, left = torch.linalg.qr(B.transpose(0, 1).flatten(1))  # (out, n r): all B side by side
    q_in, right = torch.linalg.qr(A.flatten(0, 1).T)  # (in, n r)
    u, s, vh = torch.linalg.svd(left @ right.T, full_matrices=False)
    m = min(len(s), len(a))
    root = s[:m].sqrt()
    a[:m] = root[:, None] * vh[:m] @ q_in.T
    b[:, :m] = q_out @ u[:, :m] * root
    return s.square()
