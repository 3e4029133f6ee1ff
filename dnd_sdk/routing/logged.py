"""Routing decisions as entries of the decision log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dnd_sdk.prompts import prompt_set_hash
from dnd_sdk.routing.decision_log import Decision, DecisionLog

if TYPE_CHECKING:
    from dnd_sdk.routing.router import RouteDecision
    from dnd_sdk.routing.thresholds import Thresholds


def log_decision(
    log: DecisionLog,
    thresholds: Thresholds,
    kind: str,
    prompts: Sequence[str],
    route: RouteDecision,
    *,
    rule: str = "single",
    mode: str = "auto",
    cluster: int | None = None,
) -> None:
    """Log one decision made by `thresholds`; see the fields of `Decision`."""
    texts = (p.encode("utf-8", "replace").decode() for p in prompts)  # lone surrogates cannot be hashed
    log.append(
        Decision(
            kind=kind,
            prompts=prompt_set_hash(texts),
            n_prompts=len(prompts),
            decision=route.decision,
            adapter=None if route.adapter is None else route.adapter.name,
            score=route.score,
            neighbours=tuple(route.neighbours),
            support=route.support,
            thresholds={k: getattr(thresholds, k) for k in ("reuse", "reuse_single", "support")},
            rule=rule,
            mode=mode,
            by=route.by,
            reason=route.reason,
            cluster=cluster,
            probability=route.probability,
            in_distribution=route.in_distribution,
        )
    )
