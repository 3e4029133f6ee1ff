"""A second reader for a task's labels: the sentence encoder, which knows what their words mean.

* How near a prompt is to a label's word, against the other prompts and labels, is an opinion that needs no answers.
  It is taken where it agrees with the base's more often than chance would: two readers that err in different ways do
  so only if both see something. On labels such as yes and no they do not, and nothing is taken.
* Both opinions together are what a ridge regression from the last MLP's inner values is fitted to, in closed form: the
  adapter then says of a new prompt what the two would have said.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_AGREEMENT = 0.1
"""Cohen's kappa between encoder and base over the prompts, from which the encoder is heard."""
RIDGE = 1.0
"""Of the mean squared norm of the inner values where answers begin."""


def agreement(a: Tensor, b: Tensor) -> float:
    """Cohen's kappa of two readers' choices, from their scores (n, K): 1 always agree, 0 as chance would."""
    x, y, K = a.argmax(1), b.argmax(1), a.shape[1]
    share_x, share_y = (c.bincount(minlength=K) / len(c) for c in (x, y))
    chance = float(share_x @ share_y)
    return (float((x == y).float().mean()) - chance) / max(1 - chance, 1e-6)


def both_opinions(own: Tensor, similarity: Tensor) -> tuple[Tensor, float] | None:
    """What to add to the labels' logits, up to scale: (centred opinion (n, K), its size in logits); None: nothing.

    Args:
        own: (n, K) the base's log-probabilities of the labels, evened out.
        similarity: (n, K) cosine of each prompt with each label's word.
    """
    theirs = _centred(similarity - similarity.mean(0))
    mine = _centred(own)
    size, spread = float(mine.std()), float(theirs.std())
    if not (size > 1e-6 and spread > 1e-6) or agreement(mine, theirs) <= MIN_AGREEMENT:
        return None
    opinion = (mine / size + theirs / spread).softmax(-1)
    return opinion - opinion.mean(0), size


def _centred(scores: Tensor) -> Tensor:
    return scores - scores.mean(1, keepdim=True)


def readout(x: Tensor, elsewhere: Tensor, opinion: Tensor, size: float) -> Tensor:
    """(K, f) a linear map of inner values that says `opinion` (n, K) of `x` (n, f), and nothing elsewhere (m, f).

    On average over `x` it is zero, too; its values there have the standard deviation `size`.
    """
    mean = x.mean(0)
    rows = torch.cat([x - mean, mean[None] * len(x) ** 0.5, elsewhere * (len(x) / max(1, len(elsewhere))) ** 0.5])
    wanted = torch.zeros(len(rows), opinion.shape[1], dtype=torch.float64)
    wanted[: len(x)] = opinion.double()
    rows = rows.double()
    gram = rows @ rows.T
    ridge = RIDGE * float(gram.diagonal()[: len(x)].mean())
    gram.diagonal().add_(ridge)
    weights = torch.linalg.solve(gram, wanted).T @ rows
    said = (x - mean).double() @ weights.T
    return (weights * (size / said.std().clamp(min=1e-12))).float()


def lower_rank(left: Tensor, right: Tensor, r: int, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (A (r, f), B (d, r)) whose product does to `samples` (s, f) nearly what `left @ right` does.

    `left` (d, q), `right` (q, f). The output's main directions over the samples are kept; q <= r loses nothing.
    """
    _, sizes, u = torch.linalg.svd((samples @ right.T) @ left.T, full_matrices=False)  # (s, d): its right vectors
    directions = u[: min(r, len(sizes))]  # (<= r, d)
    A = directions @ left @ right
    scale = A.norm(dim=1, keepdim=True).clamp(min=1e-12).sqrt()
    out_A, out_B = torch.zeros(r, right.shape[1]), torch.zeros(left.shape[0], r)
    out_A[: len(A)], out_B[:, : len(A)] = A / scale, (directions * scale).T
    return out_A, out_B
