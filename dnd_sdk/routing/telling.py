"""A decision as it is told to machines, by the command and by the server alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Decided(Protocol):
    """What every kind of decision has: of the router, of an adaptation, and of either as a server told it."""

    @property
    def decision(self) -> str:
        """`"reuse"`, `"generate"`, `"merge"` or `"base"`."""

    @property
    def score(self) -> float | None:
        """Of the nearest adapter."""

    @property
    def neighbours(self) -> Sequence[tuple[str, float]]:
        """Nearest adapters and their scores, best first."""

    @property
    def reason(self) -> str:
        """In words."""

    @property
    def probability(self) -> float | None:
        """That the nearest adapter is the job's own."""

    @property
    def in_distribution(self) -> float | None:
        """That the prompts are a job and not noise."""


def decision_fields(decided: Decided) -> dict[str, Any]:
    """The decision and what it was made from, JSON-able; who serves is not in it."""
    return {
        "decision": decided.decision,
        "score": decided.score,
        "neighbours": [{"name": name, "score": score} for name, score in decided.neighbours],
        "reason": decided.reason,
        "probability": decided.probability,
        "in_distribution": decided.in_distribution,
    }
