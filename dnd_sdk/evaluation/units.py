"""What the units of an evaluation come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Scores = dict[str, float | None]
RowScores = dict[str, list[float] | None]
"""Scores of single rows by metric (`scoring.METRICS`), in their order; None where a metric does not apply."""


@dataclass(frozen=True)
class Unit:
    """What one (task, method, seed) came to: `scores`, or `error`."""

    task: str
    method: str
    seed: int
    n: int
    """Test rows asked."""
    scores: Scores | None
    error: str | None = None
    unrelated: Scores | None = None
    """Mean change of scores on tasks of other families; None where no adapter was asked about any."""
    rows: RowScores | None = None
    """What `scores` are the means of; None where they are means of other means."""


class Made(NamedTuple):
    """What answers were made with."""

    base: str
    generator: str | None
    """Its id; None without one."""
