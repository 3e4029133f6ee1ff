"""How good probabilities are: reliability table, ECE, Brier score, AUROC; all with weights, so a bootstrap reuses them.

`p` are probabilities `(n,)`, `y` the truth `(n,)` of 0 and 1, `w` weights `(n,)` of 0 or more; a weight of 2 counts as
two equal events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Measure = Callable[[Array, Array, Array], float]

N_BINS = 10
RESAMPLES = 1000


def brier(p: Array, y: Array, w: Array) -> float:
    """Mean squared error; 0.25 for always saying a half."""
    return float(np.average((p - y) ** 2, weights=w))


def ece(p: Array, y: Array, w: Array) -> float:
    """Expected calibration error: mean distance of predicted from observed over `N_BINS` equally wide bins."""
    gaps = np.bincount(_bins(p), weights=w * (p - y), minlength=N_BINS)
    return float(np.abs(gaps).sum() / w.sum())


def auroc(p: Array, y: Array, w: Array) -> float:
    """How often a random true event has the higher probability than a random false one, ties counting a half.

    NaN when either kind is missing.
    """
    _, level = np.unique(p, return_inverse=True)
    ones, zeros = np.bincount(level, weights=w * y), np.bincount(level, weights=w * (1 - y))
    below = np.cumsum(zeros) - zeros
    total = ones.sum() * zeros.sum()
    return float((ones * (below + zeros / 2)).sum() / total) if total > 0 else float("nan")


def table(p: Array, y: Array, w: Array) -> list[dict[str, Any]]:
    """Per bin that holds events: its bounds, how many events, mean probability, share that was true."""
    bins, rows = _bins(p), []
    for i in range(N_BINS):
        inside = bins == i
        if w[inside].sum() > 0:
            predicted, observed = (float(np.average(v[inside], weights=w[inside])) for v in (p, y))
            bounds = {"low": i / N_BINS, "high": (i + 1) / N_BINS}
            rows.append({**bounds, "n": int(inside.sum()), "predicted": predicted, "observed": observed})
    return rows


def measure(p: Array, y: Array, units: NDArray[np.int64], *, even: bool = False, seed: int = 0) -> dict[str, Any]:
    """All of it, with 95 % bootstrap intervals over `units` `(n,)`: the task (or kind of noise) of each event.

    `even` weighs true and false events alike, however many there are. True and false events whose units differ are
    drawn by their own units.
    """
    rng = np.random.default_rng(seed)
    once = _balanced(y, np.ones(len(p)), even)
    draws = [_balanced(y, w, even) for w in _resampled(y, units, rng)]
    found: dict[str, Any] = {}
    for name, score in (("ece", ece), ("brier", brier), ("auroc", auroc)):
        values = [score(p, y, w) for w in draws]
        low, high = np.nanpercentile(values, [2.5, 97.5])
        found[name] = {"value": score(p, y, once), "ci95": [float(low), float(high)]}
    return {**found, "n": len(p), "bins": table(p, y, once)}


def _resampled(y: Array, units: NDArray[np.int64], rng: np.random.Generator) -> list[Array]:
    """Weights of each resample; units that only hold true or only false events keep their number."""
    ones, zeros = np.unique(units[y > 0.5]), np.unique(units[y < 0.5])
    strata = [np.unique(units)] if np.isin(ones, zeros).any() else [ones, zeros]
    weights = []
    for _ in range(RESAMPLES):
        counts = np.zeros(units.max() + 1)
        for stratum in strata:
            np.add.at(counts, rng.choice(stratum, len(stratum)), 1)
        weights.append(counts[units])
    return weights


def _balanced(y: Array, w: Array, even: bool) -> Array:
    ones, zeros = w[y > 0.5].sum(), w[y < 0.5].sum()
    if not even or not ones or not zeros:
        return w
    return np.asarray(np.where(y > 0.5, w / ones, w / zeros))


def _bins(p: Array) -> NDArray[np.int64]:
    return np.minimum((p * N_BINS).astype(np.int64), N_BINS - 1)
