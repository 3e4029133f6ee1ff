"""Logged decisions under other thresholds."""

from __future__ import annotations

from typing import Any

import pytest
from test_routing_decision_log import decision

from dnd_sdk.routing import Thresholds
from dnd_sdk.routing.replay import replay_decisions

THRESHOLDS = Thresholds(reuse=0.9, reuse_single=0.5, support=-0.1)


def one_set(score: float, made: str, **changes: Any) -> Any:
    return decision(kind="adapt", rule="set", decision=made, score=score, neighbours=(("t", score),), **changes)


@pytest.mark.parametrize(
    ("logged", "now"),
    [
        (decision(), None),
        (decision(neighbours=(("t", 0.4),)), "base"),
        (decision(decision="base", neighbours=()), None),
        (one_set(0.95, "reuse", support=0.2), None),
        (one_set(0.8, "reuse", support=0.2), "generate"),
        (one_set(0.8, "reuse", support=-0.5), "base"),
        (one_set(0.95, "generate", support=0.2), "reuse"),
        (one_set(0.8, "base", support=-0.5), None),
        (one_set(0.8, "base", mode="reuse"), None),
        (one_set(0.8, "base", by="vetting"), None),
        (one_set(0.95, "base", by="vetting"), "reuse"),
        (one_set(0.1, "reuse", by="exact"), None),
        (one_set(0.99, "generate", by="asked"), None),
        (decision(by="cluster", neighbours=()), None),
    ],
)
def test_each_rule(logged: Any, now: str | None) -> None:
    changes, n_scored = replay_decisions([logged], THRESHOLDS)
    assert [c.now for c in changes] == ([] if now is None else [now])
    assert n_scored == (logged.by in ("scores", "vetting"))


def test_nothing_changes_under_the_thresholds_of_the_time() -> None:
    logged = [one_set(s / 10, "reuse" if s >= 9 else "generate", support=0.0) for s in range(11)]
    assert replay_decisions(logged, THRESHOLDS) == ([], 11)
    stricter = Thresholds(reuse=0.95, reuse_single=0.5, support=-0.1)
    assert [(c.logged.score, c.now) for c in replay_decisions(logged, stricter)[0]] == [(0.9, "generate")]
