"""Routing scores as probabilities: logistic maps (Platt's), fitted on what thresholds are fitted on.

* Even odds are assumed throughout: as often as not the job's own adapter is stored, and the prompts are a real job. Who
  knows better odds can move the logit by their logarithm.
* A similarity piles up at 1, so its log-odds are mapped; of the links tried on train tasks this erred least.
* Draws of one task are alike. The targets are therefore smoothed (as Platt does) by the number of tasks and of kinds of
  noise, not of draws: ten kinds never seen to pass do not make an eleventh impossible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dnd_sdk.errors import ConfigError
from dnd_sdk.files import is_finite_number
from dnd_sdk.routing.support import NOISE_CENTRES, NOISE_KINDS, Support, centres_of

Link = Literal["identity", "logit"]
_CLIP = 0.02
"""Similarities are taken as within this and 1 minus this: their log-odds say nothing more beyond."""
_MAX_ROUNDS, _MAX_STEP, _TOLERANCE = 100, 4.0, 1e-9


@dataclass(frozen=True)
class ScoreMap:
    """`sigmoid(slope * link(score) + offset)`; never falls as the score rises."""

    slope: float
    offset: float
    link: Link = "identity"
    """`"logit"`: of the score clipped to 0.02..0.98."""

    def __post_init__(self) -> None:
        if not (is_finite_number(self.slope) and self.slope > 0 and is_finite_number(self.offset)):
            raise ConfigError(f"a score map needs a slope above 0 and an offset, got {self.slope!r}, {self.offset!r}")
        if self.link not in ("identity", "logit"):
            raise ConfigError(f"a score map's link is identity or logit, got {self.link!r}")

    def __call__(self, score: float) -> float:
        """The probability of this score."""
        x = _linked(torch.tensor(score, dtype=torch.float64), self.link).item()
        z = self.slope * x + self.offset
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


@dataclass(frozen=True)
class Probabilities:
    """What routing scores mean; a map that is None was not measured, and gives no probability."""

    reuse: ScoreMap | None = None
    """P(the nearest stored adapter is the job's own | its score against a set of 8 prompts or more)."""
    reuse_single: ScoreMap | None = None
    """The same for one prompt."""
    support: ScoreMap | None = None
    """P(the prompts are a job and not noise | `Support.score` of a set)."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Probabilities:
        """Inverse of `asdict`; raises `ConfigError`, `TypeError` or `AttributeError` for anything else."""
        known = {name: data.get(name) for name in ("reuse", "reuse_single", "support")}
        return cls(**{name: None if found is None else ScoreMap(**found) for name, found in known.items()})

    def own(self, score: float | None, rule: str) -> float | None:
        """Of the nearest adapter's score, by the rule for a `"set"` or a `"single"` prompt."""
        found = self.reuse_single if rule == "single" else self.reuse
        return None if score is None or found is None else found(score)

    def in_distribution(self, support: float | None) -> float | None:
        """Of a set's support."""
        return None if support is None or self.support is None else self.support(support)


def fit_map(
    scores: Tensor, labels: Tensor, n_independent: tuple[int, int], *, link: Link = "identity", even: bool = False
) -> ScoreMap | None:
    """The logistic map of `scores` (n,) to `labels` (n,) of 0 and 1; None when the score does not rise with the label.

    `n_independent` is how many independent sources the ones and the zeros come from; `even` weighs both alike.
    """
    x, y = _linked(scores.double(), link), labels.double()
    spread = x.std(unbiased=False)
    if len(y.unique()) < 2 or spread < 1e-6:
        return None
    n_ones, n_zeros = n_independent
    targets = torch.where(y > 0.5, (n_ones + 1) / (n_ones + 2), 1 / (n_zeros + 2))
    weights = torch.where(y > 0.5, 0.5 / y.mean(), 0.5 / (1 - y.mean())) if even else torch.ones_like(y)
    slope, offset = _newton((x - x.mean()) / spread, targets, weights)
    slope, offset = slope / spread.item(), offset - slope * (x.mean() / spread).item()
    return ScoreMap(slope, offset, link) if slope > 0 else None


def _newton(x: Tensor, targets: Tensor, weights: Tensor) -> tuple[float, float]:
    """Slope and offset of the weighted logistic regression; smoothed targets keep its optimum finite."""
    design = torch.stack([x, torch.ones_like(x)], dim=1)
    at = torch.zeros(2, dtype=torch.float64)
    for _ in range(_MAX_ROUNDS):
        p = torch.sigmoid(design @ at)
        gradient = design.T @ (weights * (p - targets))
        curvature = (design * (weights * p * (1 - p))[:, None]).T @ design
        step = torch.linalg.solve(curvature + 1e-9 * torch.eye(2, dtype=torch.float64), gradient)
        at = at - step * min(1.0, _MAX_STEP / max(step.norm().item(), 1e-12))
        if step.norm() < _TOLERANCE:
            break
    return at[0].item(), at[1].item()


def reuse_map(own: Tensor, other: Tensor, n_tasks: int) -> ScoreMap | None:
    """From the scores (trials,) of the own adapter and of the best other: each trial once with the own one stored."""
    scores = torch.cat([torch.maximum(own, other), other])
    right = torch.cat([own >= other, torch.zeros(len(other), dtype=torch.bool)])
    return fit_map(scores, right, (n_tasks, n_tasks), link="logit")


def support_map(
    vectors: Mapping[str, Tensor],
    unseen: Mapping[str, Support],
    centres: Tensor,
    noise: Tensor,
    sizes: Sequence[int],
    *,
    n_draws: int,
    rng: torch.Generator,
) -> ScoreMap | None:
    """From sets of each task, scored by `unseen` (without its family), and of noise, each kind left out in its turn.

    `centres` are those of all tasks. None when there is but one prompt of noise, or as for `fit_map`.
    """
    tasks = torch.cat([_set_scores(v, unseen[name], sizes, n_draws, rng) for name, v in vectors.items()])
    kinds = noise.chunk(len(NOISE_KINDS))  # `noise_prompts` lists kind after kind
    if len(kinds) < 2:
        return None
    foreign = []
    for i, kind in enumerate(kinds):
        rest = centres_of(torch.cat([*kinds[:i], *kinds[i + 1 :]]), NOISE_CENTRES)
        foreign.append(_set_scores(kind, Support(centres, rest), sizes, n_draws, rng))
    labels = torch.cat([torch.ones(len(tasks)), torch.zeros(sum(map(len, foreign)))])
    return fit_map(torch.cat([tasks, *foreign]), labels, (len(vectors), len(kinds)), even=True)


def _set_scores(v: Tensor, support: Support, sizes: Sequence[int], n_draws: int, rng: torch.Generator) -> Tensor:
    rows = [torch.randperm(len(v), generator=rng)[:n] for n in sizes for _ in range(n_draws)]
    return torch.tensor([support.score(v[r]) for r in rows])


def _linked(scores: Tensor, link: Link) -> Tensor:
    return scores if link == "identity" else torch.logit(scores.clamp(_CLIP, 1 - _CLIP))
