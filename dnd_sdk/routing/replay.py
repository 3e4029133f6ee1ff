"""Logged decisions made again from their scores: what would other thresholds have changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dnd_sdk.routing.decision_log import Decision
from dnd_sdk.routing.router import verdict
from dnd_sdk.routing.thresholds import Thresholds

_OVERRULED = ("vetting", "no generator")


class Change(NamedTuple):
    """A decision that would be another one now."""

    logged: Decision
    now: str
    """`"reuse"`, `"generate"` or `"base"`."""


def replay_decisions(decisions: Iterable[Decision], thresholds: Thresholds) -> tuple[list[Change], int]:
    """The decisions that change under these thresholds, and how many were decided by scores at all.

    A generation that was refused counts as one that would be refused again. What an adapter that was never made, or was
    made in addition, would do to later decisions is not followed.
    """
    changes, n_scored = [], 0
    for logged in decisions:
        if logged.by != "scores" and logged.by not in _OVERRULED:
            continue
        n_scored += 1
        now = verdict(thresholds, logged.rule, logged.mode, _best(logged), logged.support)
        if now == "generate" and logged.by in _OVERRULED:
            now = "base"
        if now != logged.decision:
            changes.append(Change(logged, now))
    return changes, n_scored


def _best(logged: Decision) -> float | None:
    return max((score for _, score in logged.neighbours), default=None)
