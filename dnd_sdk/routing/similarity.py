"""How alike two sets of prompt embeddings are: the one measure that routing, calibration and clustering share.

* Every prompt of one set is compared with every prompt of the other. The mean squared cosine (sign kept) is divided by
  the geometric mean of the same figure within each set, so two samples of one task score about 1 whether its prompts
  are near copies of a template or have hardly a word in common.
* The nearest exemplar (mean of maxima) was tried first and separates tasks far worse: its score mostly measures how
  uniform a task is. The same holds for centroids alone, to a lesser degree.
* A single prompt counts as a set that agrees with itself perfectly, so its scores are lower; they need a threshold of
  their own. Sets of 2 to 7 prompts are judged with caution: one pair of equal prompts is added to what was seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnd_sdk.adapters import MAX_EXEMPLARS as MAX_EXEMPLARS
from dnd_sdk.errors import InputError

MIN_COHERENCE = 0.02
"""Below this, prompts agree no more than random sentences do, and dividing by it would only amplify noise."""
_UNIT = 1e-3
"""How far from 1 the norm of a normalised vector may be: half-precision encoders miss it by about this much."""


def check_vectors(vectors: Tensor, width: int | None = None) -> Tensor:
    """Return `(n, C)` vectors as contiguous fp32 on the CPU.

    Raises `InputError` unless there is at least one row, `C` is `width` (None: any) and all are finite and normalised.
    """
    if vectors.dim() != 2 or vectors.numel() == 0 or (width is not None and vectors.shape[1] != width):
        expected = f"(n, {width or 'width'}) with n >= 1"
        raise InputError(f"prompt embeddings have shape {tuple(vectors.shape)}, expected {expected}")
    vectors = vectors.detach().to("cpu", torch.float32).contiguous()
    norms = vectors.norm(dim=1)
    if not torch.isfinite(norms).all():
        raise InputError("prompt embeddings hold NaN or inf")
    worst = (norms - 1).abs().max().item()
    if worst > _UNIT:
        raise InputError(
            f"prompt embeddings are not L2-normalised: a norm is off by {worst:.3g}", fix="divide each by its norm"
        )
    return vectors


def choose_exemplars(pooled: Tensor, k: int = MAX_EXEMPLARS) -> Tensor:
    """At most `k` rows of `(n, C)`, evenly spaced.

    A plain sample on purpose: picking the most different rows would misstate how alike the set's prompts are.
    """
    return pooled[_spaced(len(pooled), k)].clone()


def kernel(products: Tensor) -> Tensor:
    """Cosine to similarity of one pair: its square with its sign, any shape."""
    return products * products.abs()


def coherence(vectors: Tensor) -> float:
    """How alike the prompts of one set `(n, C)` are: mean pairwise similarity, 1.0 for a single prompt."""
    n = len(vectors)
    pairs = kernel(vectors @ vectors.T)
    between = (pairs.sum() - pairs.diagonal().sum()).item()
    return max((between + 1.0) / (n * (n - 1) + 1.0), MIN_COHERENCE)


def set_similarity(
    a: Tensor, b: Tensor, *, coherence_a: float | None = None, coherence_b: float | None = None
) -> float:
    """How alike two sets `(n, C)` and `(m, C)` are: about 1 for samples of one task; known coherences save time."""
    own = coherence(a) if coherence_a is None else coherence_a
    other = coherence(b) if coherence_b is None else coherence_b
    return kernel(a @ b.T).mean().item() / (own * other) ** 0.5


def _spaced(n: int, k: int) -> Tensor:
    return torch.arange(n) if n <= k else torch.linspace(0, n - 1, k).round().long()
